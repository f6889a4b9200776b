// Markdown tables and the escaping that names from a result need inside them.

/** Text that came from a result, safe inside a cell of a Markdown table. */
export function cellText(text: string): string {
  return text
    .replace(/\s+/g, ' ')
    .replace(/[\\`*_[\]|<>#~]/g, (sign) => (sign === '<' ? '&lt;' : sign === '>' ? '&gt;' : `\\${sign}`))
    .trim();
}

/** A table; cells are Markdown already. Short rows are an error of the caller. */
export function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  for (const row of rows) {
    if (row.length !== head.length) throw new Error(`table row of ${row.length} cells under ${head.length} headings`);
  }
  const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line), ''].join('\n');
}

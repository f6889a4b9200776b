// Puts what a benchmark printed into the page that keeps its figures, under its heading, and leaves the rest as it is.
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

const MEASUREMENTS = join(import.meta.dirname, '../../docs/measurements.md');

/** The section that others stay behind when a new one is added. */
const LAST = 'Others';

/** `page` with the text of its section "## heading" replaced, or added before the last one. */
export function withSection(page: string, heading: string, text: string): string {
  const section = `## ${heading}\n\n${text.trim()}\n\n`;
  const parts = page.split(/^(?=## )/m);
  const at = parts.findIndex((part) => part.startsWith(`## ${heading}\n`));
  if (at >= 0) parts[at] = section;
  else {
    const last = parts.findIndex((part) => part.startsWith(`## ${LAST}\n`));
    if (last < 0) parts.push(`\n${section}`);
    else parts.splice(last, 0, section);
  }
  return `${parts.join('').trimEnd()}\n`;
}

/** The same in docs/measurements.md. */
export async function writeSection(heading: string, text: string): Promise<void> {
  const page = await readFile(MEASUREMENTS, 'utf8');
  await writeFile(MEASUREMENTS, withSection(page, heading, text));
}

// Names and numbers of a trace as people see them: a trace comes from anybody, and a terminal obeys what it is shown.

/** A name that is kept as bytes (latin1), as text: UTF-8 where it is, without control and direction characters. */
export function shownName(bytes: string): string {
  const text = Buffer.from(bytes, 'latin1').toString('utf8');
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '\ufffd');
}

/** `text` cut to `width` characters at its beginning: of a path the end says most. */
export function cutPath(text: string, width: number): string {
  const characters = Array.from(text);
  return characters.length <= width ? text : `…${characters.slice(characters.length - width + 1).join('')}`;
}

/** "1 read", "2 reads". */
export function plural(count: number, word: string): string {
  return `${count} ${word}${count === 1 ? '' : 's'}`;
}

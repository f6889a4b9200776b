// containerd's filter language for List: what a client may ask of a snapshot's name, parent, kind and labels. Pure.
//   filter   = selector *("," selector)            all must hold; of several filters one must
//   selector = path [ ("==" | "!=" | "~=") value ]  without operator: the field is there
//   path     = field *("." field), field = letters, digits, "_" or a quoted string
//   value    = quoted string or anything up to a comma or space; after "~=" quoted also by "/" or "|"
// Source: containerd pkg/filters and api/services/snapshots (fields).
import { DedupError } from '../errors.ts';
import type { SnapshotRecord } from './snapshot-record.ts';

type Predicate = (snapshot: SnapshotRecord) => boolean;

function fieldOf(snapshot: SnapshotRecord, path: readonly string[]): string | undefined {
  switch (path[0]) {
    case 'name':
      return snapshot.name;
    case 'parent':
      return snapshot.parent;
    case 'kind':
      return snapshot.kind;
    case 'labels':
      return labelOf(snapshot, path.slice(1).join('.'));
    default:
      return undefined;
  }
}

function labelOf(snapshot: SnapshotRecord, name: string): string | undefined {
  return Object.hasOwn(snapshot.labels, name) ? snapshot.labels[name] : undefined;
}

class Parser {
  readonly #text: string;
  #at = 0;

  constructor(text: string) {
    this.#text = text;
  }

  #fail(expected: string): never {
    throw new DedupError(
      'INVALID_ARGUMENT',
      `filter ${JSON.stringify(this.#text)}: ${expected} expected at ${this.#at}`,
      {
        hint: 'for example: kind==committed,labels."containerd.io/snapshot.ref"==sha256:…',
      },
    );
  }

  #match(pattern: RegExp): string | undefined {
    pattern.lastIndex = this.#at;
    const found = pattern.exec(this.#text)?.[0];
    if (found !== undefined) this.#at += found.length;
    return found;
  }

  /** A quoted string in Go's syntax: the escapes of JSON, \xNN and octal ones. */
  #quoted(quotes: string): string | undefined {
    const quote = this.#text[this.#at];
    if (quote === undefined || !quotes.includes(quote)) return undefined;
    let value = '';
    for (let at = this.#at + 1; at < this.#text.length; at++) {
      const char = this.#text[at];
      if (char === quote) {
        this.#at = at + 1;
        return value;
      }
      if (char !== '\\') {
        value += char;
        continue;
      }
      const pattern = /\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[0-7]{3}|.)/suy;
      pattern.lastIndex = at;
      const found = pattern.exec(this.#text)?.[0];
      if (found === undefined) break;
      value += unescaped(found, quote);
      at += found.length - 1;
    }
    return this.#fail('the end of a quoted string');
  }

  #field(): string {
    return this.#quoted('"') ?? this.#match(/[\p{L}\p{N}_]+/uy) ?? this.#fail('a field');
  }

  #selector(): Predicate {
    const path = [this.#field()];
    while (this.#match(/\./y) !== undefined) path.push(this.#field());
    const operator = this.#match(/[=!~]=/y);
    if (operator === undefined) return (snapshot) => fieldOf(snapshot, path) !== undefined;
    const value = this.#quoted(operator === '~=' ? '"/|' : '"') ?? this.#match(/[^\s,"]+/y) ?? this.#fail('a value');
    if (operator === '==') return (snapshot) => fieldOf(snapshot, path) === value;
    if (operator === '!=') return (snapshot) => (fieldOf(snapshot, path) ?? '') !== value;
    const pattern = this.#regex(value);
    return (snapshot) => pattern.test(fieldOf(snapshot, path) ?? '');
  }

  #regex(source: string): RegExp {
    try {
      return new RegExp(source, 'u');
    } catch (cause) {
      throw new DedupError('INVALID_ARGUMENT', `filter ${JSON.stringify(this.#text)}: bad regular expression`, {
        cause,
      });
    }
  }

  parse(): Predicate {
    const selectors = [this.#selector()];
    while (this.#match(/,/y) !== undefined) selectors.push(this.#selector());
    if (this.#at < this.#text.length) this.#fail('"," or the end');
    return (snapshot) => selectors.every((holds) => holds(snapshot));
  }
}

function unescaped(sequence: string, quote: string): string {
  const letter = sequence[1] ?? '';
  if (letter === 'x' || letter === 'u') return String.fromCharCode(Number.parseInt(sequence.slice(2), 16));
  if (/^[0-7]{3}$/.test(sequence.slice(1))) return String.fromCharCode(Number.parseInt(sequence.slice(1), 8));
  const control = { n: '\n', t: '\t', r: '\r', a: '\x07', b: '\b', f: '\f', v: '\v' }[letter];
  // In a regular expression between "/" or "|" a backslash belongs to the expression unless it hides the quote.
  if (quote !== '"') return letter === quote ? letter : sequence;
  return control ?? letter;
}

/** One predicate for all filters of a List; without filters everything matches. Errors: INVALID_ARGUMENT. */
export function parseFilters(filters: readonly string[]): Predicate {
  const parsed = filters.filter((text) => text !== '').map((text) => new Parser(text).parse());
  return parsed.length === 0 ? () => true : (snapshot) => parsed.some((holds) => holds(snapshot));
}

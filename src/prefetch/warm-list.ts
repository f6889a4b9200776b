// Which images were brought to the node ahead, and until when they are kept though no snapshot names them: one small file below
// the root, so that a dedupd that comes after this one keeps them too. Used by WarmUp; drops nothing itself.
import { readFileSync, writeSync } from 'node:fs';
import { z } from 'zod';
import { errorCode, wrapError } from '../errors.ts';
import { writeFileAtomically } from '../fs/image/atomic-file.ts';
import type { Logger } from '../log.ts';

const layerKey = z.object({ digest: z.string(), index: z.string(), scope: z.string() });
const entrySchema = z.object({
  reference: z.string(),
  platform: z.string(),
  layers: z.array(layerKey),
  until_ms: z.number(),
});
const fileSchema = z.object({ images: z.array(entrySchema) });

/** One image that was warmed. */
export interface WarmEntry {
  /** In full, as formatReference() writes it. */
  readonly reference: string;
  /** "os/architecture[/variant]". */
  readonly platform: string;
  /** Identities of its layers, bottom to top. */
  readonly layers: readonly { readonly digest: string; readonly index: string; readonly scope: string }[];
  /** When it goes, milliseconds since 1970. */
  readonly untilMs: number;
}

export interface WarmListOptions {
  readonly file: string;
  /** True for an image that is kept however old its entry is. */
  readonly isConfigured: (reference: string) => boolean;
  readonly log: Logger;
  /** Milliseconds since 1970. */
  readonly now?: () => number;
}

export class WarmList {
  readonly #options: WarmListOptions;
  readonly #now: () => number;
  #entries: readonly WarmEntry[];

  /** Reads the file; one that is damaged counts as none, and the log says so. */
  constructor(options: WarmListOptions) {
    this.#options = options;
    this.#now = options.now ?? Date.now;
    this.#entries = this.#read();
  }

  #read(): WarmEntry[] {
    const { file, log } = this.#options;
    try {
      const { images } = fileSchema.parse(JSON.parse(readFileSync(file, 'utf8')));
      return images.map(({ until_ms, ...entry }) => ({ ...entry, untilMs: until_ms }));
    } catch (error) {
      // Without the list images are only fetched once more.
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT')
        log.warn({ err: error, file }, 'which images were warmed cannot be read: they are not kept any more');
      return [];
    }
  }

  /** Images that are kept now. Those whose time is over are forgotten. */
  entries(): readonly WarmEntry[] {
    const kept = this.#entries.filter(
      ({ reference, untilMs }) => untilMs > this.#now() || this.#options.isConfigured(reference),
    );
    if (kept.length < this.#entries.length) {
      try {
        this.#write(kept);
      } catch (error) {
        // The next reader of the file sees their age as well.
        this.#options.log.warn({ err: error, code: errorCode(error) }, 'warmed images are not written down');
        this.#entries = kept;
      }
    }
    return this.#entries;
  }

  /** Keeps an image, instead of what its name stood for before; as long as the longer of both wishes. Errors: STORE_IO. */
  put(entry: WarmEntry): WarmEntry {
    const same = (other: WarmEntry): boolean =>
      other.reference === entry.reference && other.platform === entry.platform;
    const before = this.entries().find(same);
    const kept = { ...entry, untilMs: Math.max(entry.untilMs, before?.untilMs ?? 0) };
    this.#write([...this.#entries.filter((other) => !same(other)), kept]);
    return kept;
  }

  /** Keeps images of these names, of any platform, no longer; how many there were. Errors: STORE_IO. */
  forget(references: ReadonlySet<string>): number {
    const rest = this.entries().filter(({ reference }) => !references.has(reference));
    const gone = this.#entries.length - rest.length;
    if (gone > 0) this.#write(rest);
    return gone;
  }

  #write(entries: readonly WarmEntry[]): void {
    const { file } = this.#options;
    const images = entries.map(({ untilMs, ...entry }) => ({ ...entry, until_ms: untilMs }));
    try {
      writeFileAtomically(file, (fd) => writeSync(fd, `${JSON.stringify({ images }, undefined, 1)}\n`));
    } catch (error) {
      throw wrapError(error, `writing ${file}`, 'STORE_IO');
    }
    this.#entries = entries;
  }
}

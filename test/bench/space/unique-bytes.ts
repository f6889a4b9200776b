// The least that files take on a disk of 4 KiB blocks when each distinct content is kept once: added up from unpacked
// trees with nothing of ours.
import { join } from 'node:path';
import { BLOCK_BYTES, roundUp } from '../../../src/units.ts';
import { fileDigests, regularFiles } from '../regular-files.ts';

export class UniqueBytes {
  readonly #files = new Set<string>();
  readonly #parts = new Set<string>();
  /** Of distinct contents of whole files, each rounded up to 4 KiB. */
  fileBytes = 0;
  /** The same for distinct parts of 4 MiB at fixed offsets of files. */
  partBytes = 0;
  /** As `partBytes`, without parts that are nothing but zeros: holes. */
  writtenBytes = 0;

  /** Adds every regular file below `tree`. */
  addTree(tree: string): void {
    for (const { path, bytes } of regularFiles(tree)) {
      const { whole, parts } = fileDigests(join(tree, path));
      if (this.#files.has(whole)) continue;
      this.#files.add(whole);
      this.fileBytes += roundUp(bytes, BLOCK_BYTES);
      for (const part of parts) {
        if (this.#parts.has(part.digest)) continue;
        this.#parts.add(part.digest);
        const rounded = roundUp(part.bytes, BLOCK_BYTES);
        this.partBytes += rounded;
        if (!part.zeros) this.writtenBytes += rounded;
      }
    }
  }
}

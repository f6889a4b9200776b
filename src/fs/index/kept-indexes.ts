// Indexes that this node made of layers which nobody had indexed, and keeps when the layers have gone: the next pull of
// such a layer is lazy. One small file per layer names its blobs, which lie beside those of layers in use. Owned by
// LayerIntake; retention.ts asks it before it deletes files that no row names.
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { type Digest, isDigest } from '../../digest.ts';
import type { Logger } from '../../log.ts';
import { MiB } from '../../units.ts';

/** Blobs kept at most, bytes; the oldest go first. An index with its restart points is 3 to 5 % of its layer. */
const MAX_KEPT_BYTES = 256 * MiB;

export interface KeptIndex {
  readonly layer: Digest;
  readonly index: Digest;
  readonly restart: Digest;
  /** Bytes of both blobs. */
  readonly bytes: number;
}

const digest = z.string().refine(isDigest, 'is not a SHA-256 digest');
const written = z.object({ layer: digest, index: digest, restart: digest, bytes: z.int().min(0), at: z.int() });

export class KeptIndexes {
  readonly #directory: string;
  readonly #log: Logger;
  readonly #maxBytes: number;
  /** By layer, oldest first. */
  readonly #kept = new Map<string, KeptIndex>();
  #bytes = 0;

  private constructor(directory: string, log: Logger, maxBytes: number) {
    this.#directory = directory;
    this.#log = log;
    this.#maxBytes = maxBytes;
  }

  /** Reads what was kept before; files that make no sense are removed. Errors: those of node:fs. */
  static async open(directory: string, log: Logger, maxBytes = MAX_KEPT_BYTES): Promise<KeptIndexes> {
    const kept = new KeptIndexes(directory, log, maxBytes);
    await mkdir(directory, { recursive: true, mode: 0o700 });
    const found: z.infer<typeof written>[] = [];
    for (const name of await readdir(directory)) {
      const file = join(directory, name);
      try {
        found.push(written.parse(JSON.parse(await readFile(file, 'utf8'))));
      } catch {
        await rm(file, { force: true }); // Half written: its layer is indexed anew.
      }
    }
    for (const { layer, index, restart, bytes } of found.sort((a, b) => a.at - b.at)) {
      kept.#remember({ layer: layer as Digest, index: index as Digest, restart: restart as Digest, bytes });
    }
    return kept;
  }

  /** The index kept of a layer. */
  find(layer: string): KeptIndex | undefined {
    return this.#kept.get(layer);
  }

  /** Every index that is kept. */
  all(): readonly KeptIndex[] {
    return [...this.#kept.values()];
  }

  /** Keeps the index of a layer beyond the layer itself; its blobs are on the disk already. */
  async keep(entry: KeptIndex): Promise<void> {
    await this.forget(entry.layer);
    this.#remember(entry);
    try {
      await writeFile(this.#file(entry.layer), JSON.stringify({ ...entry, at: Date.now() }), { mode: 0o600 });
      for (const [oldest] of this.#kept) {
        if (this.#bytes <= this.#maxBytes || this.#kept.size === 1) break;
        await this.forget(oldest);
      }
    } catch (error) {
      // Only the next pull is slower for it.
      this.#log.warn({ err: error, layer: entry.layer }, 'an index is not kept for the next pull');
    }
  }

  /** Its blobs go with the next look at orphans, unless a layer uses them. */
  async forget(layer: string): Promise<void> {
    const known = this.#kept.get(layer);
    if (known === undefined) return;
    this.#kept.delete(layer);
    this.#bytes -= known.bytes;
    await rm(this.#file(layer), { force: true });
  }

  #remember(entry: KeptIndex): void {
    this.#kept.set(entry.layer, entry);
    this.#bytes += entry.bytes;
  }

  #file(layer: string): string {
    return join(this.#directory, `${layer.slice(layer.indexOf(':') + 1)}.json`);
  }
}

// Turns an overlay upper directory, as containerd unpacked a layer into it, into a layer index and a stream of verified
// pieces. Called by dedupd for the layers it converts in the background. The work is done by conversion-worker.ts; this
// thread only passes pieces on.
import { Worker } from 'node:worker_threads';
import type { Digest } from '../../digest.ts';
import { DedupError, wrapError } from '../../errors.ts';
import type { BuiltIndex } from '../index/builder.ts';
import type { OnPiece } from '../index/chunker.ts';
import type { LayerIndex } from '../index/layer-index.ts';
import {
  CANCELLED,
  CONTROL_NUMBERS,
  type ConversionMessage,
  type ConversionOrder,
  type ConversionResult,
  DONE_BATCHES,
  PIECE_NUMBERS,
  type PieceBatch,
  STEPS,
} from './messages.ts';

/** Heap of the thread: about four million entries fit. */
const MAX_HEAP_MIB = 1024;

export interface DirectoryBuildOptions {
  /** Absolute path of the directory; nothing in it changes meanwhile. */
  readonly directory: string;
  /** Stands in the index as layerDigest and diffID: the name of this conversion, no registry's blob. */
  readonly identity: Digest;
  /** Powers of two, bytes; a piece is at most a chunk. */
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  /**
   * Called with every whole piece, in order; a promise holds the build up: at most 8 MiB, or two pieces if they are
   * larger, have been read and not been done with. Pieces of a chunk that turns out to be all zeros come too.
   */
  readonly onPiece?: OnPiece | undefined;
  /** Called after every batch with the bytes of content and the entries so far. */
  readonly onProgress?: ((bytes: number, entries: number) => void) | undefined;
  /** Awaited first and after every batch: while it is pending the build stands still, within the bounds of `onPiece`. */
  readonly gate?: (() => Promise<void> | undefined) | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Reads the directory once, in a thread of its own at idle priority, and returns the index of a layer that unpacks to it.
 * When it settles nobody reads the directory any more. The same directory and options give the same bytes.
 * Errors: LAYER_NOT_LAZY naming what an image would not show as the directory does: the layer is to be left alone;
 * NOT_FOUND when the directory is gone; FAILED_PRECONDITION when it changes meanwhile; STORE_IO; CANCELLED; what `onPiece` and `gate` throw.
 */
export async function buildDirectoryIndex(options: DirectoryBuildOptions): Promise<BuiltIndex> {
  return await new Conversion(options).run();
}

class Conversion {
  readonly #options: DirectoryBuildOptions;
  readonly #control = new Int32Array(new SharedArrayBuffer(CONTROL_NUMBERS * Int32Array.BYTES_PER_ELEMENT));
  /** Settles when the last batch that came is done with; never rejects. */
  #delivered: Promise<void> = Promise.resolve();
  #result: ConversionResult | undefined;
  #failure: unknown;
  #failed = false;

  constructor(options: DirectoryBuildOptions) {
    this.#options = options;
  }

  async run(): Promise<BuiltIndex> {
    const { signal } = this.#options;
    const abort = (): void => this.#fail(this.#cancelled());
    signal?.addEventListener('abort', abort, { once: true });
    try {
      await this.#passGate();
      if (signal?.aborted === true) throw this.#cancelled();
      await this.#work();
      await this.#delivered;
    } finally {
      signal?.removeEventListener('abort', abort);
    }
    if (this.#failed) throw this.#failure;
    if (this.#result === undefined)
      throw new DedupError('INTERNAL', `${this.#doing()}: its thread ended without a word`);
    return builtIndex(this.#result);
  }

  #doing(): string {
    return `converting the unpacked layer ${this.#options.directory}`;
  }

  #cancelled(): DedupError {
    return new DedupError('CANCELLED', `${this.#doing()}: cancelled`, { cause: this.#options.signal?.reason });
  }

  /** Runs the thread to its end. */
  async #work(): Promise<void> {
    const { directory, identity, chunkBytes, pieceBytes } = this.#options;
    const order: ConversionOrder = { directory, identity, chunkBytes, pieceBytes, control: this.#control.buffer };
    // Compiled sources end in .js; this file's own extension says which kind is running.
    const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
    const worker = new Worker(new URL(`./conversion-worker.${extension}`, import.meta.url), {
      name: 'conversion',
      workerData: order,
      resourceLimits: { maxOldGenerationSizeMb: MAX_HEAP_MIB },
    });
    await new Promise<void>((resolve) => {
      worker.on('message', (message: ConversionMessage) => this.#take(message));
      worker.on('error', (cause: NodeJS.ErrnoException) => {
        const tooLarge = cause.code === 'ERR_WORKER_OUT_OF_MEMORY';
        this.#fail(wrapError(cause, this.#doing(), tooLarge ? 'LAYER_NOT_LAZY' : 'INTERNAL'));
      });
      worker.on('exit', () => resolve());
    });
  }

  #take(message: ConversionMessage): void {
    switch (message.kind) {
      case 'batch':
        this.#delivered = this.#delivered
          .then(() => this.#deliver(message))
          .then(
            () => this.#tell(DONE_BATCHES),
            (error: unknown) => this.#fail(error),
          );
        break;
      case 'result':
        this.#result = message;
        break;
      case 'failure':
        this.#fail(new DedupError(message.code, `${this.#doing()}: ${message.message}`, { details: message.details }));
    }
  }

  async #deliver({ bytes, pieces, digests, doneBytes, doneEntries }: PieceBatch): Promise<void> {
    if (this.#failed) return;
    const { onPiece, onProgress } = this.#options;
    if (onPiece !== undefined) {
      const waiting: Promise<void>[] = [];
      const names = Buffer.from(digests.buffer, digests.byteOffset, digests.length);
      try {
        for (let i = 0, name = 0; i < pieces.length; i += PIECE_NUMBERS, name += 32) {
          const promise = onPiece({
            chunk: pieces[i]!,
            piece: pieces[i + 1]!,
            digest: names.subarray(name, name + 32),
            length: pieces[i + 3]!,
            parts: [Buffer.from(bytes, pieces[i + 2]!, pieces[i + 3]!)],
          });
          if (promise !== undefined) waiting.push(promise);
        }
      } finally {
        await Promise.allSettled(waiting);
      }
      await Promise.all(waiting);
    }
    onProgress?.(doneBytes, doneEntries);
    await this.#passGate();
  }

  /** Waits until the caller lets the build go on, or ends it. */
  async #passGate(): Promise<void> {
    const { gate, signal } = this.#options;
    if (signal?.aborted === true) return;
    const open = gate?.();
    if (open === undefined) return;
    open.catch(() => undefined); // When the signal comes first, nobody waits for it any more.
    const aborted = Promise.withResolvers<void>();
    const abort = (): void => aborted.resolve();
    signal?.addEventListener('abort', abort, { once: true });
    try {
      await Promise.race([open, aborted.promise]);
    } finally {
      signal?.removeEventListener('abort', abort);
    }
  }

  /** The first failure counts; the thread ends at its next batch. */
  #fail(error: unknown): void {
    if (!this.#failed) this.#failure = error;
    this.#failed = true;
    this.#tell(CANCELLED);
  }

  /** Adds one to a number that the thread looks at, and wakes it. */
  #tell(number: typeof DONE_BATCHES | typeof CANCELLED): void {
    Atomics.add(this.#control, number, 1);
    Atomics.add(this.#control, STEPS, 1);
    Atomics.notify(this.#control, STEPS);
  }
}

/** Buffers arrive as plain arrays. */
function buffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
}

function builtIndex({ index, indexBlob, restartBlob }: ConversionResult): BuiltIndex {
  const { entries, chunks } = index;
  const whole: LayerIndex = {
    ...index,
    entries: {
      ...entries,
      xattrSets: entries.xattrSets.map((set) => set.map(({ name, value }) => ({ name, value: buffer(value) }))),
    },
    chunks: { ...chunks, digest: buffer(chunks.digest), pieceDigest: buffer(chunks.pieceDigest) },
  };
  return { index: whole, indexBlob: buffer(indexBlob), restartBlob: buffer(restartBlob) };
}

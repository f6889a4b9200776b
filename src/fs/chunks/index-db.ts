// index.db as the main thread sees it: every change is a call to the writer's worker thread; point look-ups use a
// read-only connection of their own. Used by NodeStore only.
import { Worker } from 'node:worker_threads';
import Database from 'better-sqlite3';
import { DedupError, ERROR_CODES, type ErrorCode } from '../../errors.ts';
import { BLOCK_BYTES } from '../../units.ts';
import type {
  IndexCallMessage,
  IndexCalls,
  IndexOp,
  IndexReplyMessage,
  OpenAnswer,
  OpenRequest,
} from './index-protocol.ts';

/** Where a chunk lies: one of its placements. */
export interface PlacedChunk {
  /** Address of this placement. */
  readonly address: number;
  /** First block of the chunk's first placement; the chunk's row id. */
  readonly chunkId: number;
  readonly size: number;
  readonly pieceBytes: number;
}

/** A layer that contains a chunk. */
export interface LayerChunk {
  readonly layerId: number;
  /** Position in the layer's chunk table. */
  readonly seq: number;
}

interface Waiting {
  resolve(value: unknown): void;
  reject(error: unknown): void;
}

export class IndexDb {
  readonly #worker: Worker;
  readonly #waiting = new Map<number, Waiting>();
  #nextId = 1;
  #ended: DedupError | undefined;
  #reader: Database.Database | undefined;
  #chunkBefore: Database.Statement | undefined;
  #placementBefore: Database.Statement | undefined;
  #layersOf: Database.Statement | undefined;

  private constructor() {
    // Compiled sources end in .js; this file's own extension says which kind is running.
    const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
    this.#worker = new Worker(new URL(`./index-db-worker.${extension}`, import.meta.url), {
      name: 'index-db',
      resourceLimits: { maxOldGenerationSizeMb: 256 },
    });
    this.#worker.on('message', (reply: IndexReplyMessage) => this.#onReply(reply));
    this.#worker.on('error', (cause) => this.#end(new DedupError('INTERNAL', 'the index.db thread failed', { cause })));
    this.#worker.on('exit', () => this.#end(new DedupError('CLOSED', 'index.db is closed')));
  }

  /** Opens or makes index.db. Errors: STORE_IO, FAILED_PRECONDITION for a newer schema. */
  static async open(request: OpenRequest): Promise<{ db: IndexDb; answer: OpenAnswer }> {
    const db = new IndexDb();
    try {
      const answer = await db.call('open', request);
      db.#openReader(request.file);
      return { db, answer };
    } catch (error) {
      await db.close();
      throw error;
    }
  }

  #openReader(file: string): void {
    const reader = new Database(file, { readonly: true });
    reader.pragma('cache_size = -2048');
    this.#reader = reader;
    this.#chunkBefore = reader
      .prepare('SELECT id, size, piece_bytes FROM chunks WHERE id <= ? ORDER BY id DESC LIMIT 1')
      .raw();
    this.#placementBefore = reader
      .prepare(
        `SELECT p.block, p.chunk_id, c.size, c.piece_bytes FROM placements p JOIN chunks c ON c.id = p.chunk_id
         WHERE p.block <= ? ORDER BY p.block DESC LIMIT 1`,
      )
      .raw();
    this.#layersOf = reader.prepare(
      'SELECT layer_id AS layerId, seq FROM layer_chunks WHERE chunk_id = ? ORDER BY layer_id, seq',
    );
  }

  /** Asks the writer. Calls are answered in order. Errors: CLOSED, STORE_IO, STORE_FULL and those of the call. */
  call<Op extends IndexOp>(op: Op, args: IndexCalls[Op]['args']): Promise<IndexCalls[Op]['result']> {
    if (this.#ended !== undefined) return Promise.reject(this.#ended);
    const id = this.#nextId++;
    const { promise, resolve, reject } = Promise.withResolvers<unknown>();
    this.#waiting.set(id, { resolve, reject });
    const message: IndexCallMessage = { id, op, args };
    this.#worker.postMessage(message);
    return promise as Promise<IndexCalls[Op]['result']>;
  }

  #onReply(reply: IndexReplyMessage): void {
    const waiting = this.#waiting.get(reply.id);
    this.#waiting.delete(reply.id);
    if ('error' in reply) {
      const code = reply.error.code in ERROR_CODES ? (reply.error.code as ErrorCode) : 'INTERNAL';
      waiting?.reject(new DedupError(code, reply.error.message));
    } else {
      waiting?.resolve(reply.result);
    }
  }

  #end(error: DedupError): void {
    this.#ended ??= error;
    for (const waiting of this.#waiting.values()) waiting.reject(this.#ended);
    this.#waiting.clear();
  }

  /** The placement that contains `address`, or undefined when it is not assigned. A point look-up on this thread. */
  find(address: number): PlacedChunk | undefined {
    if (this.#chunkBefore === undefined || this.#placementBefore === undefined)
      throw new DedupError('CLOSED', 'index.db is closed');
    const block = Math.floor(address / BLOCK_BYTES);
    const chunk = this.#chunkBefore.get(block) as [number, number, number] | undefined;
    if (chunk !== undefined) {
      const [id, size, pieceBytes] = chunk;
      if (block < id + Math.ceil(size / BLOCK_BYTES))
        return { address: id * BLOCK_BYTES, chunkId: id, size, pieceBytes };
    }
    const extra = this.#placementBefore.get(block) as [number, number, number, number] | undefined;
    if (extra !== undefined) {
      const [first, chunkId, size, pieceBytes] = extra;
      if (block < first + Math.ceil(size / BLOCK_BYTES))
        return { address: first * BLOCK_BYTES, chunkId, size, pieceBytes };
    }
    return undefined;
  }

  /** Every layer that contains a chunk, oldest first. A point look-up on this thread. */
  layersOf(chunkId: number): LayerChunk[] {
    if (this.#layersOf === undefined) throw new DedupError('CLOSED', 'index.db is closed');
    return this.#layersOf.all(chunkId) as LayerChunk[];
  }

  /** Finishes the calls made so far, writes everything into the one file and ends the thread. Idempotent. */
  async close(): Promise<void> {
    this.#reader?.close();
    this.#reader = undefined;
    this.#chunkBefore = undefined;
    this.#placementBefore = undefined;
    this.#layersOf = undefined;
    if (this.#ended === undefined) {
      const closed = this.call('close', {});
      this.#ended = new DedupError('CLOSED', 'index.db is closed');
      try {
        await closed;
      } finally {
        await this.#worker.terminate();
      }
    }
    await this.#worker.terminate();
  }
}

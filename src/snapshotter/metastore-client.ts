// Calls to metadata.db from the serving thread: the same methods as SqliteMetastore, each a promise answered by the
// worker thread that owns the database, so that a slow commit never stops the gRPC loop.
import { Worker } from 'node:worker_threads';
import { DedupError } from '../errors.ts';
import type { SqliteMetastore } from './metastore.ts';
import type { MetastoreReply, MetastoreWorkerData } from './metastore-worker.ts';

/** SqliteMetastore with every method returning a promise. Calls are carried out in the order they are made. */
export type Metastore = {
  readonly [Name in keyof SqliteMetastore]: (
    ...args: Parameters<SqliteMetastore[Name]>
  ) => Promise<ReturnType<SqliteMetastore[Name]>>;
};

interface Waiting {
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: unknown) => void;
}

class Thread {
  readonly #worker: Worker;
  readonly #waiting = new Map<number, Waiting>();
  #lastId = 0;
  #ended: DedupError | undefined;

  constructor(workerData: MetastoreWorkerData) {
    // Compiled files end in .js; URLs in strings are not rewritten by the compiler.
    const extension = import.meta.url.endsWith('.ts') ? 'ts' : 'js';
    const worker = new URL(`./metastore-worker.${extension}`, import.meta.url);
    // Flags of this process (--input-type, --test) are not the thread's.
    this.#worker = new Worker(worker, { workerData, execArgv: [] });
    this.#worker.on('message', (reply: MetastoreReply) => this.#settle(reply));
    this.#worker.on('error', (error) =>
      this.#end(new DedupError('STORE_IO', 'the metadata thread died', { cause: error })),
    );
    this.#worker.on('exit', () => this.#end(new DedupError('CLOSED', 'metadata.db is closed')));
  }

  /** Resolves when the database is open. */
  opened(): Promise<unknown> {
    return new Promise((resolve, reject) => this.#waiting.set(0, { resolve, reject }));
  }

  call(method: string, args: readonly unknown[]): Promise<unknown> {
    if (this.#ended !== undefined) return Promise.reject(this.#ended);
    const id = ++this.#lastId;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, method, args });
    });
  }

  #settle({ id, value, failure }: MetastoreReply): void {
    const waiting = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (failure === undefined) {
      waiting?.resolve(value);
      return;
    }
    const { code, message, hint, details } = failure;
    waiting?.reject(new DedupError(code, message, { details, ...(hint === undefined ? {} : { hint }) }));
  }

  #end(reason: DedupError): void {
    this.#ended ??= reason;
    for (const { reject } of this.#waiting.values()) reject(this.#ended);
    this.#waiting.clear();
  }
}

const METHODS: Record<keyof SqliteMetastore, true> = {
  lastId: true,
  find: true,
  get: true,
  findByRef: true,
  chain: true,
  insert: true,
  commit: true,
  remove: true,
  update: true,
  list: true,
  setUsage: true,
  setLowers: true,
  inUse: true,
  ids: true,
  removedIds: true,
  protectedUpTo: true,
  protect: true,
  unprotect: true,
  markRemoved: true,
  forgetRemoved: true,
  addSource: true,
  sources: true,
  untoldSources: true,
  byId: true,
  pendingConversions: true,
  conversionCounts: true,
  convert: true,
  unproven: true,
  proven: true,
  leave: true,
  retryLeft: true,
  takeBack: true,
  convertedAs: true,
  lazyChainsWith: true,
  leftoverDirectories: true,
  giveUpDirectory: true,
  directoryGone: true,
  setting: true,
  changeSetting: true,
  close: true,
};

/**
 * Opens `file` in a thread of its own. `close()` ends the thread; later calls fail with CLOSED. `boot` is what commits are
 * said to be made in, when it is not the kernel's boot id.
 */
export async function openMetastore(file: string, boot?: string): Promise<Metastore> {
  const thread = new Thread({ file, boot });
  await thread.opened();
  const entries = Object.keys(METHODS).map((name) => [name, (...args: unknown[]) => thread.call(name, args)] as const);
  return Object.fromEntries(entries) as unknown as Metastore;
}

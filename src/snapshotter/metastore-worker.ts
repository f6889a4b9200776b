// The thread that owns metadata.db: runs the calls of metastore-client.ts one after another. Started by it only.
import { parentPort, workerData } from 'node:worker_threads';
import { DedupError, type ErrorCode, type ErrorDetails } from '../errors.ts';
import { SqliteMetastore } from './metastore.ts';

export interface MetastoreWorkerData {
  readonly file: string;
  /** The boot that commits are made in; that of the kernel when absent. */
  readonly boot: string | undefined;
}

/** A call to the thread; `args` is structured-cloneable. */
export interface MetastoreRequest {
  readonly id: number;
  readonly method: string;
  readonly args: readonly unknown[];
}

export interface MetastoreFailure {
  readonly code: ErrorCode;
  readonly message: string;
  readonly hint: string | undefined;
  readonly details: ErrorDetails;
}

export interface MetastoreReply {
  readonly id: number;
  readonly value?: unknown;
  readonly failure?: MetastoreFailure;
}

function failureOf(error: unknown): MetastoreFailure {
  if (error instanceof DedupError) {
    return { code: error.code, message: error.message, hint: error.hint, details: error.details };
  }
  const { code, message } = error as { code?: string; message?: string };
  const full = code === 'SQLITE_FULL';
  return {
    code: full ? 'STORE_FULL' : 'STORE_IO',
    message: `metadata.db: ${message ?? String(error)}`,
    hint: full ? 'make room on the disk of the root directory' : undefined,
    details: { sqlite: code },
  };
}

function serve(port: NonNullable<typeof parentPort>): void {
  let store: SqliteMetastore;
  try {
    const { file, boot } = workerData as MetastoreWorkerData;
    store = new SqliteMetastore(file, boot);
  } catch (error) {
    port.postMessage({ id: 0, failure: failureOf(error) } satisfies MetastoreReply);
    return;
  }
  port.on('message', ({ id, method, args }: MetastoreRequest) => {
    try {
      const call = store[method as keyof SqliteMetastore] as (...values: readonly unknown[]) => unknown;
      port.postMessage({ id, value: call.apply(store, [...args]) } satisfies MetastoreReply);
    } catch (error) {
      port.postMessage({ id, failure: failureOf(error) } satisfies MetastoreReply);
    }
    if (method === 'close') port.close();
  });
  port.postMessage({ id: 0 } satisfies MetastoreReply);
}

if (parentPort !== null) serve(parentPort);

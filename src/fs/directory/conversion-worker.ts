// Worker thread of one conversion: walks and reads an unpacked layer with blocking calls, at a priority below everything
// else on the node, and sends its pieces as fast as build-index.ts is done with them.
import { parentPort, workerData } from 'node:worker_threads';
import { DedupError, errorCode } from '../../errors.ts';
import { native } from '../native.ts';
import { DirectoryIndexer } from './indexer.ts';
import {
  CANCELLED,
  type ConversionFailure,
  type ConversionOrder,
  type ConversionResult,
  DONE_BATCHES,
  MAX_OUTSTANDING_BATCHES,
  type PieceBatch,
  STEPS,
} from './messages.ts';

const port = parentPort;
if (port === null) throw new DedupError('INTERNAL', 'a directory is converted in a worker thread only');
native().idleThread();

const order = workerData as ConversionOrder;
const control = new Int32Array(order.control);
let sent = 0;

function requireWanted(): void {
  if (Atomics.load(control, CANCELLED) !== 0) throw new DedupError('CANCELLED', 'the conversion was cancelled');
}

/** Sends a batch, and returns when another may be made. */
function send(batch: PieceBatch): void {
  requireWanted();
  port!.postMessage(batch, [batch.bytes, batch.pieces.buffer, batch.digests.buffer] as ArrayBuffer[]);
  sent++;
  for (;;) {
    const steps = Atomics.load(control, STEPS);
    requireWanted();
    if (sent - Atomics.load(control, DONE_BATCHES) < MAX_OUTSTANDING_BATCHES) return;
    Atomics.wait(control, STEPS, steps);
  }
}

/** A copy with memory of its own, which small buffers do not have. */
function own(bytes: Uint8Array): Uint8Array<ArrayBuffer> {
  return new Uint8Array(bytes);
}

try {
  const { index, indexBlob, restartBlob } = await new DirectoryIndexer(order, send).run();
  const result: ConversionResult = { kind: 'result', index, indexBlob: own(indexBlob), restartBlob: own(restartBlob) };
  const tables = [index.entries, index.chunks, index.spans].flatMap((table) => Object.values(table) as unknown[]);
  const memory = [result.indexBlob, result.restartBlob, ...tables.filter((value) => ArrayBuffer.isView(value))];
  port.postMessage(
    result,
    memory.map((view) => view.buffer as ArrayBuffer),
  );
} catch (error) {
  const failure: ConversionFailure = {
    kind: 'failure',
    code: errorCode(error),
    message: error instanceof Error ? error.message : String(error),
    details: error instanceof DedupError ? error.details : {},
  };
  port.postMessage(failure);
}

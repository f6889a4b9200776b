// What a conversion and its thread say to each other. The thread asks for nothing: it counts what it sent and waits
// on shared memory while too much of it is on its way.
import type { Digest } from '../../digest.ts';
import type { ErrorCode, ErrorDetails } from '../../errors.ts';
import { MiB } from '../../units.ts';
import type { LayerIndex } from '../index/layer-index.ts';

/** Bytes of content in one batch, unless a single piece is larger. */
export const BATCH_BYTES = 4 * MiB;
/** Pieces of one batch, and entries between two: bounds how long a batch of small files holds up the receiver. */
export const BATCH_PIECES = 256;
export const BATCH_ENTRIES = 2048;
/** Batches sent and not yet done with, before the thread makes another. */
export const MAX_OUTSTANDING_BATCHES = 2;

/** Numbers in the shared memory (Int32): steps counts every change of the others, and is what the thread waits on. */
export const STEPS = 0;
export const DONE_BATCHES = 1;
export const CANCELLED = 2;
export const CONTROL_NUMBERS = 3;

/** Numbers of one piece in a batch: chunk, piece of the chunk, offset in the batch's bytes, length. */
export const PIECE_NUMBERS = 4;

export interface ConversionOrder {
  readonly directory: string;
  readonly identity: Digest;
  readonly chunkBytes: number;
  readonly pieceBytes: number;
  readonly control: SharedArrayBuffer;
}

/** Whole pieces in order. May be empty: then it says how far the walk is. */
export interface PieceBatch {
  readonly kind: 'batch';
  readonly bytes: ArrayBuffer;
  readonly pieces: Uint32Array;
  /** 32 bytes each. */
  readonly digests: Uint8Array;
  /** Bytes of content and entries found so far. */
  readonly doneBytes: number;
  readonly doneEntries: number;
}

export interface ConversionResult {
  readonly kind: 'result';
  readonly index: LayerIndex;
  readonly indexBlob: Uint8Array;
  readonly restartBlob: Uint8Array;
}

export interface ConversionFailure {
  readonly kind: 'failure';
  readonly code: ErrorCode;
  readonly message: string;
  readonly details: ErrorDetails;
}

export type ConversionMessage = PieceBatch | ConversionResult | ConversionFailure;

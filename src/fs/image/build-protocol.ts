// What the daemon and the short-lived process that builds an image's metadata say to each other.
import type { ErrorCode, ErrorDetails } from '../../errors.ts';
import type { ImageLayout, ImageSummary } from './erofs/writer.ts';

export interface ImageBuildLayer {
  /** Path of the verified index blob of the layer. */
  readonly index: string;
  /** Store address in bytes of each chunk of the index's chunk table; not looked at for zero chunks of a device image. */
  readonly addresses: Float64Array;
}

/**
 * Where directories that no layer of this segment describes find their attributes: what lies below the segment, as
 * containerd would look. Together they reach down to the bottom of the chain. `directory`: a layer unpacked on disk. `layers`: a lazy segment.
 */
export type SegmentBelow =
  | { readonly kind: 'directory'; readonly path: string }
  | { readonly kind: 'layers'; readonly indexes: readonly string[] };

export interface ImageBuildRequest {
  /** Bottom to top. */
  readonly layers: readonly ImageBuildLayer[];
  /** True when no layer lies below these. */
  readonly bottom: boolean;
  readonly layout: ImageLayout;
  /** Path of the metadata file; appears complete and synced, or not at all. */
  readonly output: string;
  /** Top to bottom; only of use when `bottom` is false. */
  readonly below?: readonly SegmentBelow[];
}

export interface ImageBuildResult extends ImageSummary {
  /** Largest resident size of the process that built it, bytes. */
  readonly peakBytes: number;
}

export type ImageBuildAnswer =
  | { readonly result: ImageBuildResult }
  | { readonly code: ErrorCode; readonly message: string; readonly details: ErrorDetails };

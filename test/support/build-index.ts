// Runs the index builder on bytes in memory, in buffers of a chosen size, for tests.
import { digestOf } from '../../src/digest.ts';
import { type BuildOptions, type BuiltIndex, buildLayerIndex } from '../../src/fs/index/builder.ts';

export async function* inBuffers(bytes: Buffer, size = 65_536): AsyncGenerator<Buffer> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

/** Builds the index of `layer`, given to the builder in buffers of `bufferBytes`. */
export async function indexOf(
  layer: Buffer,
  options: Partial<BuildOptions> & { readonly bufferBytes?: number } = {},
): Promise<BuiltIndex> {
  const { bufferBytes, ...rest } = options;
  return await buildLayerIndex({
    stream: inBuffers(layer, bufferBytes),
    layerDigest: digestOf(layer),
    layerBytes: layer.length,
    ...rest,
  });
}

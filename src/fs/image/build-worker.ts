// Entry point of the process that builds images: answers each request it receives over IPC and ends when the channel is
// closed. Started only by build-image.ts; must not outlive its parent.
import { readFileSync } from 'node:fs';
import { DedupError, wrapError } from '../../errors.ts';
import { KiB } from '../../units.ts';
import { decodeLayerIndex } from '../index/format.ts';
import { writeFileAtomically } from './atomic-file.ts';
import { layersBelow } from './below.ts';
import type { ImageBuildAnswer, ImageBuildRequest, ImageBuildResult } from './build-protocol.ts';
import { writeImage } from './erofs/writer.ts';
import { mergeLayers } from './merge.ts';

const parent = process.ppid;

function build(request: ImageBuildRequest): ImageBuildResult {
  const layers = request.layers.map(({ index, addresses }) => {
    const { entries, chunks, chunkBytes } = decodeLayerIndex(readFileSync(index));
    if (addresses.length !== chunks.count) {
      throw new DedupError(
        'INTERNAL',
        `${addresses.length} addresses given for the ${chunks.count} chunks of ${index}`,
      );
    }
    return { entries, chunks, chunkBytes, addresses };
  });
  const tree = mergeLayers(
    layers.map(({ entries }) => entries),
    {
      bottom: request.bottom,
      ...(request.bottom || request.below === undefined ? {} : { below: layersBelow(request.below) }),
    },
  );
  const summary = writeFileAtomically(request.output, (fd) => {
    const written = writeImage(fd, tree, layers, request.layout);
    // The next dedupd may have built, and mounted, this image by now.
    if (process.ppid !== parent) throw new DedupError('CANCELLED', 'the dedupd that wanted it has ended');
    return written;
  });
  return { ...summary, peakBytes: process.resourceUsage().maxRSS * KiB };
}

function answer(request: ImageBuildRequest): ImageBuildAnswer {
  try {
    return { result: build(request) };
  } catch (error) {
    const full = ['ENOSPC', 'EDQUOT'].includes((error as NodeJS.ErrnoException).code ?? '');
    const wrapped = wrapError(error, `building the image ${request.output}`, full ? 'STORE_FULL' : undefined);
    return { code: wrapped.code, message: wrapped.message, details: wrapped.details };
  }
}

process.on('message', (message) => {
  const reply = answer(message as ImageBuildRequest);
  // The parent may have died meanwhile: then nobody waits, and this process ends with the channel.
  if (process.connected) process.send?.(reply);
});

// Has the files of an image's start fetched while its pull goes on: puts together the image's configuration, its built
// metadata and the loader. Called by dedupd's data plane; whatever fails here, a start only reads them later.
import { readFile, stat } from 'node:fs/promises';
import PQueue from 'p-queue';
import { z } from 'zod';
import { ErofsReader } from '../fs/image/erofs/reader.ts';
import type { LazyLoader } from '../fs/lazy-loader.ts';
import { Priority } from '../fs/span-ledger.ts';
import type { Logger } from '../log.ts';
import { KiB, MiB } from '../units.ts';
import { fetchStartFiles, type StartCommand } from './start-files.ts';

/** Metadata larger than this is not read into memory for a hint: about 400,000 entries. */
const MAX_METADATA_BYTES = 64 * MiB;

/** A configuration larger than this is none that people write. */
export const MAX_CONFIG_BYTES = 128 * KiB;
/** Metadata of so many images is held in memory at once. */
const starts = new PQueue({ concurrency: 2 });

/** OCI image-spec config.md; Docker writes null for what is empty. */
const words = z.array(z.string()).nullish();
const imageConfig = z.object({
  config: z.object({ Entrypoint: words, Cmd: words, Env: words, WorkingDir: z.string().nullish() }).nullish(),
});

/** What an image runs by default. Errors: a SyntaxError or ZodError for what is no image configuration. */
export function startCommandOf(config: Buffer): StartCommand {
  const process = imageConfig.parse(JSON.parse(config.toString('utf8'))).config;
  // Names in an image are bytes, and kept as latin1 text.
  const bytes = (text: string): string => Buffer.from(text, 'utf8').toString('latin1');
  return {
    entrypoint: (process?.Entrypoint ?? []).map(bytes),
    cmd: (process?.Cmd ?? []).map(bytes),
    env: (process?.Env ?? []).map(bytes),
    workingDir: bytes(process?.WorkingDir ?? ''),
  };
}

/** The tree in built metadata; undefined where that is too large to be read for a hint. Errors: those of node:fs, IMAGE_INVALID. */
export async function readTree(metadata: string): Promise<ErofsReader | undefined> {
  if ((await stat(metadata)).size > MAX_METADATA_BYTES) return undefined;
  return new ErofsReader(await readFile(metadata));
}

export interface ImageStart {
  /** The built metadata of the image: files as chunks of an extra device. */
  readonly metadata: string;
  readonly layerIds: readonly number[];
  /** Bytes of the image's configuration. */
  readonly config: Buffer;
  readonly loader: Pick<LazyLoader, 'ensure' | 'readHere'>;
  readonly signal: AbortSignal;
  readonly log: Logger;
}

/** Fetches what the start will read. Errors: that of the metadata or configuration; single files are passed over. */
export async function fetchImageStart(start: ImageStart): Promise<void> {
  await starts.add(() => fetchOne(start));
}

async function fetchOne(start: ImageStart): Promise<void> {
  const { loader, log, signal } = start;
  const startedMs = performance.now();
  if (start.config.length > MAX_CONFIG_BYTES) return;
  const tree = await readTree(start.metadata);
  if (tree === undefined) return;
  const options = { layers: start.layerIds, priority: Priority.start, signal };
  const { files, bytes } = await fetchStartFiles(tree, startCommandOf(start.config), {
    ensure: (ranges) => loader.ensure(ranges, options),
    read: async (ranges) => {
      await loader.ensure(ranges, options);
      return Buffer.concat(await Promise.all(ranges.map((range) => loader.readHere(range))));
    },
  });
  log.debug({ files, bytes, tookMs: performance.now() - startedMs }, 'the files of a start are here');
}

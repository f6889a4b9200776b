// `index`: makes an image lazily loadable by building and pushing the indexes of its layers. This file is the verb:
// options, progress and words for people; the work is in fs/index/publish.ts.
import cliProgress from 'cli-progress';
import type { Command } from 'commander';
import { DedupError } from '../errors.ts';
import type { ImageLocation, IndexEvent, IndexReport, LayerReport } from '../fs/index/artifact.ts';
import { indexImage } from '../fs/index/publish.ts';
import { type Credentials, parseUserPassword } from '../fs/registry/credentials.ts';
import { OciLayout, parseLayoutReference } from '../fs/registry/oci-layout.ts';
import { type RegistryOptions, RegistryPool } from '../fs/registry/pool.ts';
import { parseReference, tagOrDigest } from '../fs/registry/reference.ts';
import { formatBytes } from '../units.ts';

/** What the verb needs of the command line around it. */
export interface IndexContext {
  registryOptions(): RegistryOptions;
  /** Chunk size of the configuration, bytes. */
  readonly chunkBytes?: number;
}

interface IndexFlags {
  readonly annotate?: string;
  readonly replace?: boolean;
  readonly platform?: string;
  readonly user?: string;
  readonly plainHttp?: boolean;
  readonly insecure?: boolean;
  readonly concurrency: string;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  dedup-snapshotter index registry.example.com/app:1 --annotate registry.example.com/app:1-lazy
      pushes a copy that every containerd can use and that this snapshotter loads lazily
  dedup-snapshotter index registry.example.com/app:1
      leaves the image as it is and pushes the indexes as a referrer of it (nodes use it with index_trust "referrer")
  dedup-snapshotter index registry.example.com/app:1 --annotate registry.example.com/app:1 --replace
      changes the image in place
  dedup-snapshotter index oci:/tmp/layout:app --annotate 127.0.0.1:5000/app:lazy --platform linux/amd64
      from an OCI layout directory into a registry

Layers that cannot be loaded lazily are listed with the reason; containerd unpacks them as ever.
`;

export function registerIndexCommand(program: Command, context: IndexContext): void {
  program
    .command('index')
    .description('make an image lazily loadable: build indexes of its layers and push them')
    .argument('<reference>', 'image in a registry, or oci:DIR:TAG for one in an OCI layout directory')
    .option('--annotate <reference>', 'push a copy of the image that names its indexes, under this name')
    .option('--replace', 'allow --annotate to give the name of the image itself')
    .option('--platform <os/arch>', 'only this platform of a multi-platform image (default: all)')
    .option(
      '-u, --user <user:password>',
      'credentials for the registry that is pushed to (default: those of Docker or the configuration)',
    )
    .option('--plain-http', 'speak HTTP without TLS to the registries named')
    .option('--insecure', 'accept any certificate of the registries named, or none')
    .option('--concurrency <layers>', 'layers read at once', '2')
    .option('--json', 'print the result as JSON')
    .addHelpText('after', EXAMPLES)
    .action(async (reference: string, flags: IndexFlags) => {
      await index(reference, flags, context);
    });
}

async function index(reference: string, flags: IndexFlags, context: IndexContext): Promise<void> {
  if (flags.replace === true && flags.annotate === undefined) {
    throw new DedupError('INVALID_ARGUMENT', '--replace says nothing without --annotate');
  }
  const concurrency = Number(flags.concurrency);
  if (!Number.isInteger(concurrency) || concurrency < 1 || concurrency > 16) {
    throw new DedupError(
      'INVALID_ARGUMENT',
      `--concurrency ${JSON.stringify(flags.concurrency)} is not a number from 1 to 16`,
    );
  }
  const names = [reference, ...(flags.annotate === undefined ? [] : [flags.annotate])];
  const credentials = flags.user === undefined ? undefined : parseUserPassword(flags.user);
  await using pool = new RegistryPool(optionsFor(names, flags, context.registryOptions()));
  const interrupt = new AbortController();
  const onSignal = () => interrupt.abort(new DedupError('CANCELLED', 'interrupted'));
  process.once('SIGINT', onSignal);
  process.once('SIGTERM', onSignal);
  const progress = process.stderr.isTTY ? new BarProgress() : new LineProgress();
  try {
    // Credentials go to the registry that is pushed to, and to no other one.
    const pushedTo = hostOf(flags.annotate ?? reference);
    const given = (name: string) => (hostOf(name) === pushedTo ? credentials : undefined);
    const source = await locate(reference, pool, given(reference), false);
    const target =
      flags.annotate === undefined ? undefined : await locate(flags.annotate, pool, given(flags.annotate), true);
    const report = await indexImage({
      source,
      annotate: target === undefined ? undefined : { target, replace: flags.replace === true },
      platform: flags.platform,
      concurrency,
      ...(context.chunkBytes === undefined ? {} : { chunkBytes: context.chunkBytes }),
      signal: interrupt.signal,
      onEvent: (event) => progress.show(event),
    });
    progress.end();
    process.stdout.write(
      flags.json === true ? `${JSON.stringify(report, null, 2)}\n` : summary(report, target ?? source),
    );
  } catch (error) {
    progress.end();
    if (!interrupt.signal.aborted) throw error;
    throw new DedupError('CANCELLED', `indexing ${reference} was interrupted`, {
      cause: error,
      hint: 'run it again; nothing was tagged',
    });
  } finally {
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}

/** The hosts named on the command line count as insecure when a flag says so; nothing else does. */
function optionsFor(names: readonly string[], flags: IndexFlags, options: RegistryOptions): RegistryOptions {
  if (flags.plainHttp !== true && flags.insecure !== true) return options;
  const hosts = names.map(hostOf).filter((host) => host !== undefined);
  return { ...options, insecureHosts: [...(options.insecureHosts ?? []), ...hosts] };
}

/** Host of a registry reference; undefined for a layout directory. */
function hostOf(name: string): string | undefined {
  return parseLayoutReference(name) === undefined ? parseReference(name).host : undefined;
}

async function locate(
  name: string,
  pool: RegistryPool,
  credentials: Credentials | undefined,
  create: boolean,
): Promise<ImageLocation> {
  const layout = parseLayoutReference(name);
  if (layout !== undefined) return { repository: await OciLayout.open(layout.dir, { create }), reference: layout.tag };
  const reference = parseReference(name);
  return { repository: pool.repository(reference, credentials), reference: tagOrDigest(reference) };
}

function percent(part: number | undefined, whole: number): string {
  return part === undefined || whole === 0 ? '' : `${((100 * part) / whole).toFixed(2)} %`;
}

function layerLine(layer: LayerReport): string {
  const head = `  ${layer.digest}  ${formatBytes(layer.size).padStart(10)}`;
  if (layer.reason !== undefined) return `${head}  not lazily loadable: ${layer.reason}\n`;
  return `${head}  lazy  index ${percent(layer.index?.size, layer.size)}  restart ${percent(layer.restart?.size, layer.size)}\n`;
}

function summary(report: IndexReport, where: ImageLocation): string {
  const lines: string[] = [];
  for (const image of report.images) {
    lines.push(`${image.platform}  ${image.manifest}\n`);
    for (const layer of image.layers) lines.push(layerLine(layer));
    if (image.artifact === undefined) lines.push('  no layer can be loaded lazily; no indexes were pushed\n');
  }
  const { repository, reference } = where;
  if (report.pushed !== undefined) {
    lines.push(`pushed ${repository.name}:${reference}@${report.pushed}\n`);
  } else {
    for (const { artifact } of report.images) {
      if (artifact !== undefined) lines.push(`pushed ${repository.name}@${artifact}, a referrer of the image\n`);
    }
  }
  return lines.join('');
}

interface Progress {
  show(event: IndexEvent): void;
  end(): void;
}

function short(digest: string): string {
  return digest.slice(7, 19);
}

/** One line per layer, for logs and pipes. */
class LineProgress implements Progress {
  show(event: IndexEvent): void {
    switch (event.kind) {
      case 'layer-start':
        process.stderr.write(`layer ${short(event.digest)}: reading ${formatBytes(event.size)}\n`);
        return;
      case 'layer-progress':
        return;
      case 'layer-end':
        process.stderr.write(`layer ${short(event.report.digest)}: ${event.report.reason ?? 'indexed'}\n`);
        return;
      case 'copy':
        process.stderr.write(`blob ${short(event.digest)}: copying ${formatBytes(event.size)}\n`);
        return;
    }
  }

  end(): void {}
}

/** A bar per layer, for a terminal. */
class BarProgress implements Progress {
  readonly #bars = new Map<string, cliProgress.SingleBar>();
  readonly #multi = new cliProgress.MultiBar(
    {
      format: '[{bar}] {percentage}%  {name}  {size}  {state}',
      stream: process.stderr,
      hideCursor: true,
      clearOnComplete: false,
    },
    cliProgress.Presets.shades_classic,
  );

  show(event: IndexEvent): void {
    switch (event.kind) {
      case 'layer-start':
        this.#add(event.digest, event.size, 'reading');
        return;
      case 'layer-progress':
        this.#bars.get(event.digest)?.update(event.layerBytes);
        return;
      case 'layer-end': {
        const { digest, size, reason } = event.report;
        const bar = this.#bars.get(digest) ?? this.#add(digest, size, '');
        bar.update(Math.max(1, size), { state: reason === undefined ? 'indexed' : 'not lazy' });
        return;
      }
      case 'copy':
        this.#multi.log(`copying ${short(event.digest)} (${formatBytes(event.size)})\n`);
        return;
    }
  }

  #add(digest: string, size: number, state: string): cliProgress.SingleBar {
    const bar = this.#multi.create(Math.max(1, size), 0, { name: short(digest), size: formatBytes(size), state });
    this.#bars.set(digest, bar);
    return bar;
  }

  end(): void {
    this.#multi.stop();
  }
}

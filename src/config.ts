// The one schema of the configuration file: types, defaults, units, documentation and checks come from here. The file
// is merged over the defaults; unknown keys and bad combinations are refused with the reason; the result is frozen.
import { readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { z } from 'zod';
import { DedupError } from './errors.ts';
import {
  DEFAULT_ADDRESS,
  DEFAULT_CONTAINERD_ADDRESS,
  DEFAULT_LOG_DIR,
  DEFAULT_ROOT,
  DEFAULT_RUN_DIR,
  RootPaths,
} from './paths.ts';
import { KiB, MiB } from './units.ts';

const powerOfTwo = (value: number): boolean => Number.isInteger(Math.log2(value));
const absolute = z.string().regex(/^\//, 'must be an absolute path');
const WRITE_ENDPOINT = 'must be host, host:port, or a URL such as https://registry.example.com (without a path)';
const endpoint = z.string().refine((value) => value === '' || isEndpoint(value), WRITE_ENDPOINT);
const hostName = z.string().regex(/^[A-Za-z0-9.-]+(:\d+)?$|^\[[0-9a-fA-F:]+\](:\d+)?$/, 'must be host or host:port');

/** A server of registry requests. A path would not be part of what is asked, so none is taken. */
function isEndpoint(value: string): boolean {
  const text = /^https?:\/\//.test(value) ? value : `https://${value}`;
  const url = URL.parse(text);
  return url !== null && url.href === `${url.origin}/`;
}

const prefetch = z.strictObject({
  enabled: z
    .boolean()
    .default(true)
    .describe(
      'fetch what a start will read, by traces of earlier ones: while its image is pulled, and around what it reads; false: only what is read, and ahead of it',
    ),
  workers: z.int().min(1).max(64).default(4).describe('parallel prefetch requests, of all images together'),
  queue_size: z
    .int()
    .min(1)
    .max(1_000_000)
    .default(1000)
    .describe('spans that are planned ahead at most; the rest of a trace is planned as they are fetched'),
  trace_dir: absolute.optional().describe('where traces of starts are kept; always below the root unless given'),
});

const warmUp = z.strictObject({
  images: z
    .array(z.string().min(1))
    .default([])
    .describe('images that are brought here ahead at start and once a day, and kept as long as they are named'),
  rate_bytes_per_second: z
    .int()
    .min(0)
    .default(0)
    .describe('limit of a warm-up that is given none of its own, compressed bytes per second; 0: none'),
  all: z.boolean().default(false).describe('bring the images named whole; false: what their starts read'),
});

const ksm = z.strictObject({
  enabled: z.boolean().default(true).describe('let the kernel merge equal memory pages'),
  scan_interval: z.int().min(1).max(60_000).default(100).describe('sleep between scans, milliseconds'),
  pages_to_scan: z.int().min(1).max(1_000_000).default(100).describe('pages per scan'),
  merge_across_nodes: z.boolean().default(false).describe('merge pages of different NUMA nodes'),
});

const dedupd = z.strictObject({
  enabled: z.boolean().default(true).describe('start dedupd when none runs; without it no layer is lazy'),
  workers: z.int().min(1).max(64).default(4).describe('parallel on-demand fetches per registry'),
  registry: endpoint.min(1).default('https://registry-1.docker.io').describe('endpoint that serves docker.io'),
  fscache_domain: z.string().min(1).default('dedup-snapshotter').describe('domain_id of fscache mounts'),
});

const exporterConfig = z.strictObject({
  enable: z.boolean().default(false).describe('serve Prometheus metrics'),
  uriPrefix: z.string().regex(/^\//).default('/metrics').describe('path of the metrics'),
  port: z.int().min(1).max(65535).default(9863).describe('TCP port of the metrics'),
  address: z
    .string()
    .refine((value) => value === '' || isIP(value) !== 0, 'must be an IP address, or empty for all of this machine')
    .default('')
    .describe('IP address the metrics are served on; empty: all of this machine'),
});

const schema = z.strictObject({
  root: absolute.default(DEFAULT_ROOT).describe('everything the product keeps'),
  address: absolute.default(DEFAULT_ADDRESS).describe('unix socket of the snapshots service'),
  run_dir: absolute.default(DEFAULT_RUN_DIR).describe('sockets between our processes'),
  log_dir: absolute.default(DEFAULT_LOG_DIR).describe('log of a dedupd that the service started itself'),
  containerd_address: absolute.default(DEFAULT_CONTAINERD_ADDRESS).describe("containerd's own socket"),
  enable_erofs: z.boolean().default(true).describe('serve lazy layers as EROFS; false: ordinary layers only'),
  enable_fscache: z.boolean().default(true).describe('use fscache on-demand where the kernel has it'),
  enable_lazy: z.boolean().default(true).describe('load layers lazily; false: ordinary layers only'),
  enable_mem_dedup: z.boolean().default(true).describe('deduplicate memory with KSM'),
  registry: endpoint.default('').describe('endpoint that serves docker.io, before dedupd.registry'),
  chunk_size: z
    .int()
    .min(64 * KiB)
    .max(64 * MiB)
    .refine(powerOfTwo, 'must be a power of two')
    .default(4 * MiB)
    .describe('unit of deduplication, bytes'),
  quota_bytes: z
    .int()
    .min(0)
    .default(0)
    .describe(
      'budget for chunks on the disk, bytes; beyond it the least recently used ones that can be fetched again go; 0: none',
    ),
  log_level: z.enum(['trace', 'debug', 'info', 'warn', 'error']).default('info').describe('least severity logged'),
  verbose: z.boolean().default(false).describe('same as log_level "debug"'),
  logReportCaller: z.boolean().default(false).describe('add the calling source line to log lines'),
  transport: z
    .enum(['auto', 'fuse', 'fuse-native'])
    .default('auto')
    .describe('how the kernel asks for missing bytes; auto takes the best this kernel has'),
  direct_mounts: z
    .boolean()
    .default(true)
    .describe(
      'images that are here completely are read by the kernel without dedupd; false: every read passes through it, and is compared with what was written',
    ),
  dedup_scope: z
    .enum(['node', 'registry', 'repository'])
    .default('node')
    .describe('who shares chunks: all images of the node, of one registry, or of one repository'),
  convert_ordinary: z
    .boolean()
    .default(true)
    .describe('cut ordinary layers into chunks in the background and serve them as EROFS; not together with remap_ids'),
  index_trust: z
    .array(z.enum(['annotation', 'local', 'referrer']))
    .default(['annotation', 'local'])
    .describe(
      'where a layer index may come from. annotation: the image names it; local: made on this node; referrer: found beside the image in its registry, where whoever may push to the repository can put one',
    ),
  publish_index: z
    .enum(['off', 'local', 'registry'])
    .default('local')
    .describe(
      'what becomes of the index of a layer that this node read whole, for rpull or after containerd unpacked it. off: nothing; local: kept, so that the image is lazy when it is pulled here again; registry: pushed beside the image, too, with the credentials that dedupd has: other nodes find it if their index_trust has "referrer"',
    ),
  registry_traces: z
    .boolean()
    .default(true)
    .describe('look for a trace beside the image in its registry when this node has none of it'),
  credentials_file: absolute.optional().describe('Docker config.json with registry credentials'),
  ca_files: z.array(absolute).default([]).describe('PEM files with additional certificate authorities'),
  insecure_registries: z
    .array(hostName)
    .default([])
    .describe('registries reached over plain HTTP or with unverified certificates'),
  mirrorRegistry: z
    .array(z.strictObject({ host: hostName, insecure: z.boolean().default(false) }))
    .default([])
    .describe('registries tried before the one named in the reference'),
  rwMode: z.literal('overlayfs').default('overlayfs').describe('writable layer of containers; only overlayfs'),
  remap_ids: z
    .boolean()
    .default(false)
    .describe("set together with containerd's capability remap-ids: images in user namespaces without a copy"),
  autoRemoveDev: z.boolean().default(true).describe('detach devices when the last container using them is removed'),
  span_cache_bytes: z
    .int()
    .min(MiB)
    .max(1024 * MiB)
    .default(8 * MiB)
    .describe('memory for decompressed spans, bytes'),
  prefetch: prefetch.default(prefetch.parse({})),
  warm_up: warmUp.default(warmUp.parse({})),
  ksm: ksm.default(ksm.parse({})),
  dedupd: dedupd.default(dedupd.parse({})),
  exporterConfig: exporterConfig.default(exporterConfig.parse({})),
});

type DeepReadonly<T> = T extends object ? { readonly [K in keyof T]: DeepReadonly<T[K]> } : T;
type Parsed = z.infer<typeof schema>;
export type Config = DeepReadonly<Parsed & { prefetch: { trace_dir: string } }>;

/** Keys that are checked but have no effect in this version, with what will use them. */
const NOT_YET: readonly (readonly [path: string, feature: string])[] = [
  ['enable_fscache', 'the fscache transport'],
  ['enable_mem_dedup', 'memory deduplication'],
  ['ksm', 'memory deduplication'],
  ['autoRemoveDev', 'choosing to keep devices (they are always removed)'],
  ['dedupd.fscache_domain', 'the fscache transport'],
  ['logReportCaller', 'caller positions in log lines'],
];

function deepFreeze<T>(value: T): DeepReadonly<T> {
  if (value !== null && typeof value === 'object') {
    for (const child of Object.values(value)) deepFreeze(child);
    Object.freeze(value);
  }
  return value as DeepReadonly<T>;
}

function describeIssue(issue: z.core.$ZodIssue): string {
  const at = issue.path.length === 0 ? 'the file' : `"${issue.path.join('.')}"`;
  if (issue.code === 'unrecognized_keys') {
    const where = issue.path.length === 0 ? '' : ` in "${issue.path.join('.')}"`;
    return `unknown key ${issue.keys.map((key) => `"${key}"`).join(', ')}${where}`;
  }
  if (issue.path[0] === 'rwMode')
    return '"rwMode": only "overlayfs" is offered: other modes need a block device per container';
  return `${at}: ${issue.message}`;
}

/** Checks a parsed configuration and fills in defaults. Errors: INVALID_CONFIG naming every bad key. */
export function parseConfig(value: unknown, origin = 'configuration'): Config {
  const result = schema.safeParse(value);
  if (!result.success) {
    throw new DedupError('INVALID_CONFIG', `${origin}: ${result.error.issues.map(describeIssue).join('; ')}`, {
      hint: 'docs/configuration.md lists every key',
    });
  }
  const { data } = result;
  const trace_dir = data.prefetch.trace_dir ?? new RootPaths(data.root).traces;
  return deepFreeze({ ...data, prefetch: { ...data.prefetch, trace_dir } });
}

/** Reads a configuration file. A missing file gives the defaults unless `required`. Errors: INVALID_CONFIG, NOT_FOUND. */
export function loadConfig(file: string, required: boolean): Config {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === 'ENOENT' && !required) return parseConfig({});
    throw new DedupError('NOT_FOUND', `cannot read configuration ${file}: ${(cause as Error).message}`, { cause });
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new DedupError('INVALID_CONFIG', `${file} is not JSON: ${(cause as Error).message}`, { cause });
  }
  return parseConfig(value, file);
}

/** The keys that a file sets although nothing uses them yet, one sentence each; for the log at start. */
export function notYetInEffect(fileValue: unknown): string[] {
  const found: string[] = [];
  for (const [path, feature] of NOT_YET) {
    let value: unknown = fileValue;
    for (const part of path.split('.'))
      value = value === null || typeof value !== 'object' ? undefined : (value as Record<string, unknown>)[part];
    if (value !== undefined) found.push(`"${path}" is accepted but not yet in effect: it belongs to ${feature}`);
  }
  return found;
}

/** Why no layer may be lazy under this configuration, or undefined. */
export function lazyDisabledReason(config: Config): string | undefined {
  if (!config.enable_lazy) return '"enable_lazy" is false';
  if (!config.enable_erofs) return '"enable_erofs" is false';
  return undefined;
}

/** Why no ordinary layer is converted under this configuration, or undefined. */
export function conversionDisabledReason(config: Config): string | undefined {
  if (!config.convert_ordinary) return '"convert_ordinary" is false';
  // A chain of which a part is converted could not be used in a user namespace (snapshotter/id-mapping.ts).
  if (config.remap_ids) return '"remap_ids" is true';
  return lazyDisabledReason(config);
}

interface DocumentedType {
  readonly description?: string | undefined;
  readonly def?: { readonly innerType?: DocumentedType; readonly shape?: Record<string, DocumentedType> };
}

/** docs/configuration.md's table, generated from the schema. */
export function configurationTable(): string {
  const defaults = parseConfig({}) as unknown as Record<string, unknown>;
  const rows: string[] = ['| key | default | meaning |', '| --- | --- | --- |'];
  const walk = (shape: Record<string, DocumentedType>, prefix: string, values: Record<string, unknown>): void => {
    for (const [key, type] of Object.entries(shape)) {
      const inner = type.def?.innerType?.def?.shape;
      if (inner !== undefined) {
        walk(inner, `${prefix}${key}.`, values[key] as Record<string, unknown>);
        continue;
      }
      const described = type.description ?? type.def?.innerType?.description ?? '';
      const value = values[key] === undefined ? 'none' : `\`${JSON.stringify(values[key])}\``;
      rows.push(`| \`${prefix}${key}\` | ${value} | ${described} |`);
    }
  };
  walk(schema.shape as unknown as Record<string, DocumentedType>, '', defaults);
  return `${rows.join('\n')}\n`;
}

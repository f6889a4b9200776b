// What a pull must know of OCI and Docker image manifests: which manifest of an index suits a platform, and its layers
// with their diffIDs and chain IDs. Pure functions over bytes from a registry, which are not trusted.
import { z } from 'zod';
import { type Digest, digestOf, isDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';
import { MANIFEST_TYPES } from './manifest-json.ts';

/** Most bytes of a manifest, an index or an image configuration that are read. */
export const MAX_JSON_BYTES = 8 * 1024 * 1024;

/** A descriptor without its annotations. */
interface Descriptor {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
}

export interface Platform {
  readonly os: string;
  readonly architecture: string;
  /** Absent: any. */
  readonly variant: string | undefined;
}

const annotations = z.record(z.string(), z.string()).nullish();
const descriptor = z.looseObject({
  mediaType: z.string(),
  digest: z.string().refine(isDigest, 'is not a SHA-256 digest'),
  size: z.int().min(0),
  annotations,
});
const platformed = z.looseObject({
  ...descriptor.shape,
  platform: z.looseObject({ os: z.string(), architecture: z.string(), variant: z.string().optional() }).nullish(),
});
const indexSchema = z.looseObject({ manifests: z.array(platformed).nullish() });
const manifestSchema = z.looseObject({ config: descriptor, layers: z.array(descriptor).nullish() });
const configSchema = z.looseObject({
  os: z.string().optional(),
  architecture: z.string().optional(),
  variant: z.string().optional(),
  rootfs: z.looseObject({ diff_ids: z.array(z.string().refine(isDigest, 'is not a SHA-256 digest')).nullish() }),
});

/** One layer as an image uses it. */
export interface ImageLayer extends Descriptor {
  readonly annotations: Readonly<Record<string, string>>;
  readonly diffId: Digest;
  /** Names this layer on top of those below it (OCI image spec, config.md, "Layer ChainID"). */
  readonly chainId: Digest;
}

function parseJson<T>(schema: z.ZodType<T>, bytes: Uint8Array, what: string): T {
  let json: unknown;
  try {
    json = JSON.parse(Buffer.from(bytes).toString('utf8'));
  } catch (cause) {
    throw new DedupError('REGISTRY_PROTOCOL', `${what} is not JSON`, { cause });
  }
  const parsed = schema.safeParse(json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  throw new DedupError(
    'REGISTRY_PROTOCOL',
    `${what}: ${issue?.path.join('.') ?? ''} ${issue?.message ?? 'is malformed'}`,
  );
}

function plain(of: { mediaType: string; digest: Digest; size: number }): Descriptor {
  return { mediaType: of.mediaType, digest: of.digest, size: of.size };
}

/** Names of this machine's processor as images use them (Go's GOARCH). */
export function hostPlatform(): Platform {
  const names: Readonly<Record<string, string>> = { x64: 'amd64', ia32: '386', ppc64: 'ppc64le', loong64: 'loong64' };
  return { os: 'linux', architecture: names[process.arch] ?? process.arch, variant: undefined };
}

/** Parses "linux/arm64/v8". Errors: INVALID_ARGUMENT with a hint. */
export function parsePlatform(text: string): Platform {
  const [os, architecture, variant, ...rest] = text.split('/');
  if (!os || !architecture || rest.length > 0 || variant === '') {
    throw new DedupError('INVALID_ARGUMENT', `not a platform: ${JSON.stringify(text.slice(0, 100))}`, {
      hint: 'write it like linux/amd64 or linux/arm64/v8',
    });
  }
  const aliases: Readonly<Record<string, string>> = { x86_64: 'amd64', aarch64: 'arm64', i386: '386', armhf: 'arm' };
  return { os, architecture: aliases[architecture] ?? architecture, variant };
}

export function formatPlatform(platform: { os: string; architecture: string; variant?: string | undefined }): string {
  return [platform.os, platform.architecture, ...(platform.variant ? [platform.variant] : [])].join('/');
}

function suits(wanted: Platform, offered: { os: string; architecture: string; variant?: string | undefined }): boolean {
  if (offered.os !== wanted.os || offered.architecture !== wanted.architecture) return false;
  if (wanted.variant === undefined) return true;
  // The only 64-bit ARM there is needs no name.
  const variant = (name: string | undefined) => name || (wanted.architecture === 'arm64' ? 'v8' : '');
  return variant(wanted.variant) === variant(offered.variant);
}

/**
 * The manifest of an index for a platform, with its position. Errors: NOT_FOUND that names what there is;
 * REGISTRY_PROTOCOL for a malformed index.
 */
export function chooseManifest(
  bytes: Uint8Array,
  wanted: Platform,
  what: string,
): { descriptor: Descriptor; position: number } {
  const manifests = parseJson(indexSchema, bytes, what).manifests ?? [];
  const offered = manifests.flatMap((entry, position) =>
    MANIFEST_TYPES.has(entry.mediaType) && entry.platform && entry.platform.os !== 'unknown'
      ? [{ entry, position, platform: entry.platform }]
      : [],
  );
  const found = offered.filter(({ platform }) => suits(wanted, platform));
  // Without a wish the newest variant: v7 before v6, and an unnamed one first.
  found.sort((a, b) => (b.platform.variant ?? '~').localeCompare(a.platform.variant ?? '~'));
  const best = found[0];
  if (best === undefined) {
    const names = [...new Set(offered.map(({ platform }) => formatPlatform(platform)))].join(', ');
    throw new DedupError('NOT_FOUND', `${what} has no image for ${formatPlatform(wanted)}`, {
      hint: names === '' ? 'it lists no platform at all' : `choose one with --platform: ${names}`,
    });
  }
  return { descriptor: plain(best.entry), position: best.position };
}

/** Configuration and layers that a manifest names. Errors: REGISTRY_PROTOCOL. */
export function parseManifest(
  bytes: Uint8Array,
  what: string,
): {
  config: Descriptor;
  layers: (Descriptor & { annotations: Readonly<Record<string, string>> })[];
} {
  const manifest = parseJson(manifestSchema, bytes, what);
  return {
    config: plain(manifest.config),
    layers: (manifest.layers ?? []).map((layer) => ({ ...plain(layer), annotations: layer.annotations ?? {} })),
  };
}

/**
 * The layers of an image, bottom to top. Errors: REGISTRY_PROTOCOL when configuration and manifest do not agree on how
 * many there are; NOT_FOUND when the image is for another platform than `wanted`.
 */
export function imageLayers(
  config: Uint8Array,
  layers: readonly (Descriptor & { annotations: Readonly<Record<string, string>> })[],
  wanted: Platform,
  what: string,
): ImageLayer[] {
  const parsed = parseJson(configSchema, config, `configuration of ${what}`);
  const own = {
    os: parsed.os ?? wanted.os,
    architecture: parsed.architecture ?? wanted.architecture,
    variant: parsed.variant,
  };
  if (!suits({ ...wanted, variant: own.variant === undefined ? undefined : wanted.variant }, own)) {
    throw new DedupError('NOT_FOUND', `${what} is for ${formatPlatform(own)}, not for ${formatPlatform(wanted)}`, {
      hint: `choose it with --platform ${formatPlatform(own)} if this machine can run it`,
    });
  }
  const diffIds = parsed.rootfs.diff_ids ?? [];
  if (diffIds.length !== layers.length) {
    throw new DedupError(
      'REGISTRY_PROTOCOL',
      `${what} has ${layers.length} layers, but its configuration names ${diffIds.length}`,
    );
  }
  const chain = chainIds(diffIds as Digest[]);
  return layers.map((layer, position) => {
    return { ...layer, diffId: diffIds[position] as Digest, chainId: chain[position] as Digest };
  });
}

/** Names of the snapshots of layers, bottom to top, by their diffIDs (OCI image spec, config.md, "Layer ChainID"). */
export function chainIds(diffIds: readonly Digest[]): Digest[] {
  const chain: Digest[] = [];
  for (const diffId of diffIds) {
    const below = chain.at(-1);
    chain.push(below === undefined ? diffId : digestOf(`${below} ${diffId}`));
  }
  return chain;
}

// Image manifests, image indexes and configurations as far as `index` reads and rewrites them. The JSON itself is kept:
// fields that are not known here survive a rewrite.
import { z } from 'zod';
import { isDigest } from '../../digest.ts';
import { DedupError } from '../../errors.ts';

const platform = z.looseObject({
  os: z.string(),
  architecture: z.string(),
  variant: z.string().optional(),
});
export type Platform = z.infer<typeof platform>;

const descriptor = z.looseObject({
  mediaType: z.string(),
  digest: z.string().refine(isDigest, 'not a SHA-256 digest'),
  size: z.int().min(0),
  urls: z
    .array(z.string())
    .nullish()
    .transform((urls) => urls ?? undefined),
  annotations: z
    .record(z.string(), z.string())
    .nullish()
    .transform((annotations) => annotations ?? undefined),
  artifactType: z.string().optional(),
  platform: platform.nullish().transform((value) => value ?? undefined),
});
export type ManifestDescriptor = z.infer<typeof descriptor>;

const manifest = z.looseObject({
  schemaVersion: z.literal(2),
  mediaType: z.string().optional(),
  artifactType: z.string().optional(),
  config: descriptor,
  layers: z.array(descriptor).max(1000),
});
const index = z.looseObject({ schemaVersion: z.literal(2), manifests: z.array(descriptor).max(1000) });
const configuration = z.looseObject({
  os: z.string().optional(),
  architecture: z.string().optional(),
  variant: z.string().optional(),
  'os.version': z.string().optional(),
  rootfs: z.looseObject({ diff_ids: z.array(z.string()) }).optional(),
});

export type Json = Record<string, unknown>;

export interface ParsedManifest {
  /** As it was parsed, for rewriting. */
  readonly json: Json;
  readonly artifactType: string | undefined;
  readonly config: ManifestDescriptor;
  readonly layers: readonly ManifestDescriptor[];
}

function parse<T>(schema: z.ZodType<T>, bytes: Uint8Array, doing: string, what: string): { json: Json; value: T } {
  let json: unknown;
  try {
    json = JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('utf8'));
  } catch (cause) {
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: it is not JSON`, { cause });
  }
  const result = schema.safeParse(json);
  if (!result.success) {
    const issue = result.error.issues[0];
    const where = issue?.path.join('.') ?? '';
    throw new DedupError('REGISTRY_PROTOCOL', `${doing}: it is not ${what} (${where}: ${issue?.message ?? ''})`);
  }
  return { json: json as Json, value: result.data };
}

/** Errors: REGISTRY_PROTOCOL for what is no image manifest of schema 2. */
export function parseManifest(bytes: Uint8Array, doing: string): ParsedManifest {
  const { json, value } = parse(manifest, bytes, doing, 'an image manifest');
  return { json, artifactType: value.artifactType, config: value.config, layers: value.layers };
}

/** Errors: REGISTRY_PROTOCOL for what is no image index. */
export function parseImageIndex(bytes: Uint8Array, doing: string): { json: Json; manifests: ManifestDescriptor[] } {
  const { json, value } = parse(index, bytes, doing, 'an image index');
  return { json, manifests: value.manifests };
}

/** Platform and diffIDs of an image. Errors: REGISTRY_PROTOCOL for what is no configuration. */
export function parseConfig(bytes: Uint8Array, doing: string): { platform: Json; diffIds: readonly string[] } {
  const { value } = parse(configuration, bytes, doing, 'an image configuration');
  const found: Json = { architecture: value.architecture ?? 'unknown', os: value.os ?? 'unknown' };
  if (value['os.version'] !== undefined) found['os.version'] = value['os.version'];
  if (value.variant !== undefined && value.variant !== '') found.variant = value.variant;
  return { platform: found, diffIds: value.rootfs?.diff_ids ?? [] };
}

/** "linux/arm64/v8" */
export function platformName(of: Platform | Json | undefined): string {
  if (of === undefined) return 'unknown';
  return [of.os, of.architecture, of.variant].filter((part) => typeof part === 'string' && part !== '').join('/');
}

/** Whether `wanted` ("os/arch" or "os/arch/variant") names a platform; without a variant it names all of them. */
export function matchesPlatform(of: Platform | Json | undefined, wanted: string): boolean {
  const name = platformName(of);
  return name === wanted || name.startsWith(`${wanted}/`);
}

export function toBytes(json: Json): Buffer {
  return Buffer.from(JSON.stringify(json));
}

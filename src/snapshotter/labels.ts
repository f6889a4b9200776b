// Names of the labels that containerd's clients send with a layer, and what they say about where it can be read from.
// Called by the snapshotter; decides nothing and asks nobody.
import type { Digest } from '../digest.ts';
import { isDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';

export type Labels = Readonly<Record<string, string>>;

/** Chain ID that the client wants a remote snapshot for (containerd pkg/snapshotters, since 1.3). */
export const LABEL_SNAPSHOT_REF = 'containerd.io/snapshot.ref';
/** Digest of the index blob of the layer; arrives as an annotation of the layer descriptor. */
export const LABEL_INDEX = 'containerd.io/snapshot/dedup.index';
export const LABEL_IMAGE_REF = 'containerd.io/snapshot/cri.image-ref';
export const LABEL_LAYER_DIGEST = 'containerd.io/snapshot/cri.layer-digest';
/** Digests of this layer and those above it, comma separated; cut by the client to what a label can hold. */
export const LABEL_IMAGE_LAYERS = 'containerd.io/snapshot/cri.image-layers';
export const LABEL_MANIFEST_DIGEST = 'containerd.io/snapshot/cri.manifest-digest';

/** What the labels of one Prepare say about a layer. */
export interface LayerLabels {
  readonly ref: string;
  readonly layer: Digest | undefined;
  readonly index: Digest | undefined;
  readonly imageRef: string | undefined;
  readonly manifest: Digest | undefined;
  readonly siblings: readonly Digest[];
}

export function digestLabel(labels: Labels, name: string): Digest | undefined {
  const value = labels[name];
  return value !== undefined && isDigest(value) ? value : undefined;
}

/** The labels of a layer that may become a remote snapshot; undefined when the client asks for none. */
export function layerLabels(labels: Labels): LayerLabels | undefined {
  const ref = labels[LABEL_SNAPSHOT_REF];
  if (ref === undefined || ref === '') return undefined;
  const imageRef = labels[LABEL_IMAGE_REF];
  return {
    ref,
    layer: digestLabel(labels, LABEL_LAYER_DIGEST),
    index: digestLabel(labels, LABEL_INDEX),
    imageRef: imageRef === '' ? undefined : imageRef,
    manifest: digestLabel(labels, LABEL_MANIFEST_DIGEST),
    siblings: (labels[LABEL_IMAGE_LAYERS] ?? '').split(',').filter(isDigest),
  };
}

/** containerd's namespace in a key that it made (`ns/N/…`, metadata/snapshot.go); undefined in any other. */
export function namespaceOf(key: string): string | undefined {
  return /^([^/]+)\/\d+\//.exec(key)?.[1];
}

/** A key without containerd's `ns/N/`: what the client itself named it. */
function clientKey(key: string): string {
  return key.replace(/^[^/]+\/\d+\//, '');
}

/** True for a key that containerd's unpack of a layer makes: `extract-<time>-<random> <chain ID>` (UnpackKeyFormat, since 1.3). */
export function isUnpackKey(key: string): boolean {
  return clientKey(key).startsWith('extract-');
}

/** The chain ID that a committed snapshot is named by; undefined when its name is none. */
export function chainIdOf(name: string): Digest | undefined {
  const last = clientKey(name);
  return isDigest(last) ? last : undefined;
}

/**
 * The name of a remote snapshot: the chain ID in the namespace part (`ns/N/`) of the key that asked for it. containerd
 * finds it by label, not by name, so any unused name does; this one is what a client without namespaces expects.
 */
export function remoteName(key: string, ref: string): string {
  const prefix = /^[^/]+\/\d+\//.exec(key)?.[0] ?? '';
  return `${prefix}${ref}`;
}

/**
 * Labels after an Update with this field mask: no field or "labels" replaces all, "labels.<key>" sets one. An empty
 * value removes a label, as in containerd's own store. Errors: INVALID_ARGUMENT for any other field.
 */
export function maskedLabels(current: Labels, given: Labels, fields: readonly string[]): Labels {
  let result: Record<string, string> = fields.length === 0 ? { ...given } : { ...current };
  for (const field of fields) {
    if (field === 'labels') {
      result = { ...given };
    } else if (field.startsWith('labels.')) {
      const name = field.slice('labels.'.length);
      result[name] = given[name] ?? '';
    } else {
      throw new DedupError('INVALID_ARGUMENT', `field ${JSON.stringify(field)} of a snapshot cannot be changed`, {
        hint: 'only labels and labels.<key> can',
      });
    }
  }
  return Object.fromEntries(Object.entries(result).filter(([, value]) => value !== ''));
}

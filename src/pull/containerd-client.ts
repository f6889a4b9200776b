// containerd's own API over its unix socket: content, images, leases, snapshots and diff, as typed calls of one
// namespace. Called by pull.ts and manifest-search.ts; knows nothing of registries or of pulling.
import type * as grpc from '@grpc/grpc-js';
import { type Digest, isDigest, parseDigest } from '../digest.ts';
import { DedupError } from '../errors.ts';
import { type CallScope, ContainerdCalls, type ContainerdClientOptions, hasCode } from './containerd-calls.ts';
import { ContentWriter, type WriteResponse } from './content-writer.ts';

export type Labels = Readonly<Record<string, string>>;

/** An OCI descriptor, as containerd takes it. */
export interface Descriptor {
  readonly mediaType: string;
  readonly digest: Digest;
  readonly size: number;
  readonly annotations?: Labels;
}

export interface Mount {
  readonly type: string;
  readonly source: string;
  readonly target: string;
  readonly options: readonly string[];
}

export interface ContentInfo {
  readonly digest: Digest;
  readonly size: number;
  /** When it was made or its labels were last changed. */
  readonly updated_at: { readonly seconds: number; readonly nanos: number };
  readonly labels: Labels;
}

export interface ImageRecord {
  readonly name: string;
  readonly labels: Labels;
  readonly target: Descriptor;
}

/** What a lease keeps from garbage collection. It may be named before it exists. */
export interface LeaseResource {
  readonly id: string;
  readonly type: 'content' | 'ingests' | `snapshots/${string}`;
}

export class ContainerdClient {
  readonly address: string;
  readonly namespace: string;
  readonly #calls: ContainerdCalls;

  constructor(options: ContainerdClientOptions) {
    this.address = options.address;
    this.namespace = options.namespace;
    this.#calls = new ContainerdCalls(options);
  }

  /** Ends all connections. Safe to call twice. */
  close(): void {
    this.#calls.close();
  }

  // --- content ---------------------------------------------------------------------------------------------------

  /** Size and labels of a blob; undefined when this namespace does not have it. */
  async contentInfo(digest: Digest, scope: CallScope = {}): Promise<ContentInfo | undefined> {
    const response = await this.#calls.maybe<{ info: ContentInfo }>(
      'content',
      'Info',
      { digest },
      `content ${digest}`,
      scope,
    );
    return response?.info;
  }

  /** Sets the labels named and leaves the others. Errors: NOT_FOUND. */
  async setContentLabels(digest: Digest, labels: Labels, scope: CallScope = {}): Promise<void> {
    const paths = Object.keys(labels).map((name) => `labels.${name}`);
    const request = { info: { digest, labels }, update_mask: { paths } };
    await this.#calls.unary('content', 'Update', request, `labelling content ${digest}`, scope);
  }

  /** A whole small blob. Errors: NOT_FOUND; INVALID_ARGUMENT when it is larger than `maxBytes`. */
  async readContent(digest: Digest, maxBytes: number, scope: CallScope = {}): Promise<Buffer> {
    const doing = `reading content ${digest}`;
    const info = await this.contentInfo(digest, scope);
    if (info === undefined) throw new DedupError('NOT_FOUND', `${doing}: containerd does not have it`);
    if (info.size > maxBytes) {
      throw new DedupError('INVALID_ARGUMENT', `${doing}: ${info.size} bytes are more than the ${maxBytes} expected`);
    }
    const parts: Buffer[] = [];
    for await (const { data } of this.#calls.streamed<{ data: Buffer }>('content', 'Read', { digest }, doing, scope))
      parts.push(data);
    return Buffer.concat(parts);
  }

  /** The bytes of a blob, one message after the other. Errors: NOT_FOUND, UNAVAILABLE, CANCELLED. */
  async *streamContent(digest: Digest, scope: CallScope = {}): AsyncGenerator<Buffer> {
    const call = { timeoutMs: 0, ...scope };
    for await (const { data } of this.#calls.streamed<{ data: Buffer }>(
      'content',
      'Read',
      { digest },
      `reading ${digest}`,
      call,
    ))
      yield data;
  }

  /** What the namespace has that passes one of the filters (containerd filters/filter.go). */
  async listContent(filters: readonly string[], scope: CallScope = {}): Promise<ContentInfo[]> {
    const found: ContentInfo[] = [];
    const blocks = this.#calls.streamed<{ info: ContentInfo[] }>(
      'content',
      'List',
      { filters },
      'listing content',
      scope,
    );
    for await (const { info } of blocks) found.push(...info);
    return found;
  }

  /**
   * Opens the writer of an ingest. Its state survives `close`: a later writer of the same `ref` goes on from there.
   * Errors: ALREADY_EXISTS when the namespace has the blob; UNAVAILABLE while another writer has the ref open.
   */
  async openWriter(ref: string, blob: { digest: Digest; size: number }, scope: CallScope): Promise<ContentWriter> {
    const call = this.#calls.start(
      'content',
      'Write',
      { timeoutMs: 0, ...scope },
      (client, path, serialize, deserialize, metadata, options) =>
        client.makeBidiStreamRequest(path, serialize, deserialize, metadata, options),
    ) as grpc.ClientDuplexStream<object, WriteResponse>;
    const writer = new ContentWriter(call, (error) => this.#calls.error(error, `writing content ${blob.digest}`));
    await writer.open(ref, blob);
    return writer;
  }

  /** Drops an ingest; nothing happens when there is none. */
  async abortIngest(ref: string, scope: CallScope = {}): Promise<void> {
    await this.#calls.maybe('content', 'Abort', { ref }, `dropping ingest ${ref}`, scope);
  }

  // --- leases ----------------------------------------------------------------------------------------------------

  async createLease(id: string, labels: Labels, scope: CallScope = {}): Promise<void> {
    await this.#calls.unary('leases', 'Create', { id, labels }, `creating lease ${id}`, scope);
  }

  /** Nothing happens when there is no such lease. With `sync` garbage collection has run when this returns. */
  async deleteLease(id: string, sync: boolean, scope: CallScope = {}): Promise<void> {
    await this.#calls.maybe('leases', 'Delete', { id, sync }, `deleting lease ${id}`, scope);
  }

  async addToLease(id: string, resource: LeaseResource, scope: CallScope = {}): Promise<void> {
    await this.#calls.unary(
      'leases',
      'AddResource',
      { id, resource },
      `adding ${resource.type} ${resource.id} to lease ${id}`,
      scope,
    );
  }

  // --- images ----------------------------------------------------------------------------------------------------

  /** Name and digest of an image record; undefined when there is none. */
  async getImage(name: string, scope: CallScope = {}): Promise<{ name: string; digest: string } | undefined> {
    type Response = { image: { name: string; target: { digest: string } } };
    const response = await this.#calls.maybe<Response>('images', 'Get', { name }, `image ${name}`, scope);
    return response === undefined ? undefined : { name: response.image.name, digest: response.image.target.digest };
  }

  /** Creates the record, or points an existing one at another target; labels of an existing one stay. */
  async putImage(image: ImageRecord, scope: CallScope = {}): Promise<void> {
    const doing = `recording image ${image.name}`;
    const wire = { ...image, target: wireDescriptor(image.target) };
    try {
      await this.#calls.unary('images', 'Create', { image: wire }, doing, scope);
    } catch (error) {
      if (!hasCode(error, 'ALREADY_EXISTS')) throw error;
      await this.#calls.unary('images', 'Update', { image: wire, update_mask: { paths: ['target'] } }, doing, scope);
    }
  }

  // --- snapshots and diff ----------------------------------------------------------------------------------------

  /** True when the snapshotter has `key` in this namespace. */
  async hasSnapshot(snapshotter: string, key: string, scope: CallScope = {}): Promise<boolean> {
    const doing = `looking for snapshot ${key} of ${snapshotter}`;
    return (await this.#calls.maybe('snapshots', 'Stat', { snapshotter, key }, doing, scope)) !== undefined;
  }

  /** Errors: ALREADY_EXISTS when the snapshotter has taken the layer upon itself, or the key exists. */
  async prepareSnapshot(
    snapshotter: string,
    key: string,
    parent: string,
    labels: Labels,
    scope: CallScope,
  ): Promise<Mount[]> {
    const request = { snapshotter, key, parent, labels };
    const doing = `preparing snapshot ${key} of ${snapshotter}`;
    const response = await this.#calls.unary<{ mounts: Mount[] }>('snapshots', 'Prepare', request, doing, scope);
    return response.mounts;
  }

  /** Errors: ALREADY_EXISTS when somebody else committed `name` meanwhile. */
  async commitSnapshot(
    snapshotter: string,
    name: string,
    key: string,
    labels: Labels,
    scope: CallScope,
  ): Promise<void> {
    const request = { snapshotter, name, key, labels };
    await this.#calls.unary('snapshots', 'Commit', request, `committing snapshot ${name} of ${snapshotter}`, scope);
  }

  /** Nothing happens when there is no such snapshot. */
  async removeSnapshot(snapshotter: string, key: string, scope: CallScope = {}): Promise<void> {
    await this.#calls.maybe(
      'snapshots',
      'Remove',
      { snapshotter, key },
      `removing snapshot ${key} of ${snapshotter}`,
      scope,
    );
  }

  /** Unpacks a layer of the content store onto mounts and answers the digest of its uncompressed tar. */
  async applyDiff(diff: Descriptor, mounts: readonly Mount[], scope: CallScope): Promise<Digest> {
    const request = { diff: wireDescriptor(diff), mounts };
    const doing = `unpacking layer ${diff.digest}`;
    const response = await this.#calls.unary<{ applied: { digest: string } }>('diff', 'Apply', request, doing, {
      timeoutMs: 0,
      ...scope,
    });
    return parseDigest(response.applied.digest);
  }

  // --- records of this namespace, for whoever looks after them ---------------------------------------------------

  /** Names of all namespaces. */
  async listNamespaces(): Promise<string[]> {
    type Response = { namespaces: { name: string }[] };
    const { namespaces } = await this.#calls.unary<Response>('namespaces', 'List', {}, 'listing namespaces', {});
    return namespaces.map(({ name }) => name);
  }

  /** Image records whose target has a SHA-256 digest. */
  async listImages(): Promise<{ name: string; target: Digest }[]> {
    type Response = { images: { name: string; target: { digest: string } }[] };
    const { images } = await this.#calls.unary<Response>('images', 'List', {}, 'listing images', {});
    return images.flatMap(({ name, target }) =>
      isDigest(target.digest) ? [{ name, target: parseDigest(target.digest) }] : [],
    );
  }

  /** Containers whose file system is a snapshot of this snapshotter. */
  async listContainers(snapshotter: string): Promise<{ id: string; snapshotKey: string }[]> {
    type Response = { containers: { id: string; snapshotter: string; snapshot_key: string }[] };
    const { containers } = await this.#calls.unary<Response>('containers', 'List', {}, 'listing containers', {});
    return containers
      .filter((container) => container.snapshotter === snapshotter && container.snapshot_key !== '')
      .map((container) => ({ id: container.id, snapshotKey: container.snapshot_key }));
  }

  /** Keys of the snapshots of this snapshotter that leases keep. */
  async listLeasedSnapshots(snapshotter: string): Promise<string[]> {
    const doing = 'listing leases';
    const { leases } = await this.#calls.unary<{ leases: { id: string }[] }>('leases', 'List', {}, doing, {});
    const keys: string[] = [];
    for (const { id } of leases) {
      type Response = { resources: { id: string; type: string }[] };
      const held = await this.#calls.maybe<Response>('leases', 'ListResources', { id }, doing, {});
      for (const { id: key, type } of held?.resources ?? []) if (type === `snapshots/${snapshotter}`) keys.push(key);
    }
    return keys;
  }

  /**
   * Removes containerd's record of a snapshot, also of one that the snapshotter no longer has; false when there is none.
   * Errors: FAILED_PRECONDITION when a child of it is recorded.
   */
  async removeSnapshotRecord(snapshotter: string, key: string): Promise<boolean> {
    const doing = `removing the record of snapshot ${key}`;
    return (await this.#calls.maybe('snapshots', 'Remove', { snapshotter, key }, doing, {})) !== undefined;
  }
}

function wireDescriptor({ mediaType, digest, size, annotations }: Descriptor): object {
  return { media_type: mediaType, digest, size, annotations };
}

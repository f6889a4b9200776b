// Everything that gives space back, in random order, on one store that is too small for what is wanted of it, while
// another process reads through the kernel: evict, remove, add, collect, end quarantines, kill and start again. Every byte
// that is read is compared. An "image" here is a loop device over its file of a FUSE session, at whose addresses the
// chunks of one layer lie; a removed one may stay in use for a while, as a mount that somebody holds.
import { createHash } from 'node:crypto';
import { closeSync, copyFileSync, existsSync, openSync, rmSync, statSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { DedupError, errorCode } from '../../src/errors.ts';
import { native } from '../../src/fs/native.ts';
import { imagesInUse } from '../../src/fs/transport/erofs-mount.ts';
import { FuseTransport } from '../../src/fs/transport/fuse.ts';
import { GiB, KiB, MiB } from '../../src/units.ts';
import { type DirectReader, startDirectReader } from './direct-reader.ts';
import {
  LoaderRig,
  layerOf,
  MemoryBlobs,
  noise,
  quiet,
  type StoredTestLayer,
  type TestFile,
  type TestLayer,
} from './lazy-store.ts';
import { seededRandom } from './random-layers.ts';

const FILES = 14;
const LAYERS = 8;
const IMAGES_AT_ONCE = 5;
const READERS = 3;
const BLOCK = 4096;
/** Room for some four of the layers; what is held in quarantine counts. */
const SPACE_BYTES = 6 * MiB;
const QUOTA_BYTES = 2 * MiB;
const SIZES = { spanBytes: 128 * KiB, chunkBytes: 256 * KiB, pieceBytes: 64 * KiB } as const;

interface Image {
  readonly id: number;
  readonly stored: StoredTestLayer;
  readonly device: string;
  readonly held: number;
  readonly name: string;
  /** Its layer was dropped; somebody still has it. */
  removed: boolean;
}

export interface StressResult {
  readonly seed: number;
  /** How often each thing was done. */
  readonly done: Readonly<Record<string, number>>;
  readonly reads: number;
  /** Reads of images that were removed, or while the session was being replaced, and got an error. */
  readonly refused: number;
  /** What was read and is not right; nothing else may be in here than nothing. */
  readonly wrong: readonly string[];
  readonly evictedBytes: number;
  readonly damagedReads: number;
}

class Stress {
  readonly #random: (below: number) => number;
  readonly #rig: LoaderRig;
  readonly #reader: DirectReader;
  readonly #made: readonly TestLayer[];
  readonly #images = new Map<number, Image>();
  readonly #done: Record<string, number> = {};
  readonly #wrong: string[] = [];
  #transport!: FuseTransport;
  /** While it is replaced, reads may fail. */
  #serving = false;
  #reads = 0;
  #refused = 0;
  #evictedBytes = 0;
  #damagedReads = 0;

  constructor(random: (below: number) => number, rig: LoaderRig, reader: DirectReader, made: readonly TestLayer[]) {
    this.#random = random;
    this.#rig = rig;
    this.#reader = reader;
    this.#made = made;
  }

  static readonly storeOptions = {
    storeBytes: 64 * GiB + 4 * MiB + SPACE_BYTES,
    quotaBytes: QUOTA_BYTES,
    keepUsedMs: 0,
    quarantineMs: 30,
    flushDelayMs: 50,
    livingImages: imagesInUse,
  } as const;

  async serve(): Promise<void> {
    const { store } = this.#rig.node;
    store.onDropped(async (layerIds) => {
      this.#rig.loader.forget(layerIds);
      await this.#rig.loader.drained();
    });
    const mountDir = join(this.#rig.node.root, 'session');
    await mkdir(mountDir, { recursive: true });
    this.#transport = await FuseTransport.start({
      mountDir,
      store,
      source: {
        read: (range, id) => {
          const image = this.#images.get(id);
          return this.#rig.loader.read(range, { layers: image === undefined ? [] : [image.stored.layerId] });
        },
      },
      log: quiet,
    });
  }

  #count(what: string): void {
    this.#done[what] = (this.#done[what] ?? 0) + 1;
  }

  async add(): Promise<void> {
    if ([...this.#images.values()].filter(({ removed }) => !removed).length >= IMAGES_AT_ONCE)
      return await this.remove();
    const layer = this.#made[this.#random(this.#made.length)]!;
    const { store } = this.#rig.node;
    try {
      const stored = await this.#rig.add(layer, [{ host: 'one', reader: new MemoryBlobs(layer) }]);
      const { id } = await store.createImage(`${stored.layerId}`, [stored.layerId]);
      if (this.#images.has(id)) return;
      await store.pin(id, [stored.layerId]);
      const name = `dedup:${id}:${store.id}`;
      const fd = await this.#transport.openFile(id);
      const rest = { readOnly: true, directIo: true, offset: 0, sizeLimit: 0, blockSize: BLOCK, autoclear: false };
      const { path } = await native().loopAttach({ fd, ...rest, name });
      closeSync(fd);
      // In use, as by a mount: who starts anew moves the devices that are, and lets the others go.
      this.#images.set(id, { id, stored, device: path, held: openSync(path, 'r'), name, removed: false });
      this.#count('added');
    } catch (error) {
      if (errorCode(error) !== 'STORE_FULL') throw error;
      this.#count('no address left');
      await this.remove();
    }
  }

  #pick(accept: (image: Image) => boolean = () => true): Image | undefined {
    const images = [...this.#images.values()].filter(accept);
    return images[this.#random(Math.max(1, images.length))];
  }

  /** Drops a layer with its image; half of the time somebody has it in use on. */
  async remove(): Promise<void> {
    const image = this.#pick(({ removed }) => !removed);
    if (image === undefined) return;
    image.removed = true;
    if (this.#random(2) === 0) await this.#detach(image);
    const { store } = this.#rig.node;
    await store.unpin(image.id);
    const kept = [...this.#images.values()].filter(({ removed }) => !removed).map(({ stored }) => stored.layerId);
    await store.retainLayers(kept);
    this.#count('removed');
  }

  async #detach(image: Image): Promise<void> {
    this.#images.delete(image.id);
    closeSync(image.held);
    try {
      await native().loopDetach(image.device, image.name);
    } catch (error) {
      // It was marked to go with its last user.
      if (!(error instanceof DedupError) || error.details.syscallError !== 'ENXIO') throw error;
    }
  }

  async letGo(): Promise<void> {
    const image = this.#pick(({ removed }) => removed);
    if (image === undefined) return;
    await this.#detach(image);
    this.#count('let go');
  }

  async evict(): Promise<void> {
    await this.#rig.node.store.evict((1 + this.#random(20)) * 100 * KiB);
    this.#count('evicted');
  }

  async collect(): Promise<void> {
    const { store } = this.#rig.node;
    await store.endQuarantine({ wait: true });
    if ((await store.stats()).freed.quarantinedBytes === 0) this.#count('quarantine ended');
    else this.#count('quarantine held');
  }

  async flush(): Promise<void> {
    await this.#rig.node.store.flush();
    this.#count('flushed');
  }

  /** Ends everything as a kill does, what the database had not written included, and starts again. */
  async kill(): Promise<void> {
    const { node, loader } = this.#rig;
    await this.#note();
    const { indexDb } = node.paths;
    this.#serving = false;
    loader.close();
    await this.#transport.close();
    // What is under way ends without the database that is put back, which must be of one moment: its log may just be moved
    // into it.
    let before: bigint;
    do {
      before = statSync(indexDb, { bigint: true }).mtimeNs;
      for (const suffix of ['', '-wal']) {
        if (existsSync(indexDb + suffix)) copyFileSync(indexDb + suffix, `${node.root}/killed${suffix}`);
      }
    } while (statSync(indexDb, { bigint: true }).mtimeNs !== before);
    await node.store.close();
    for (const suffix of ['', '-wal', '-shm']) rmSync(indexDb + suffix, { force: true });
    for (const suffix of ['', '-wal']) {
      if (existsSync(`${node.root}/killed${suffix}`)) copyFileSync(`${node.root}/killed${suffix}`, indexDb + suffix);
      rmSync(`${node.root}/killed${suffix}`, { force: true });
    }
    await node.open(Stress.storeOptions);
    this.#rig.start();
    await this.serve();
    await node.store.unpinAll();
    await this.#transport.resume((id) => !this.#images.get(id)!.removed || !node.store.isForeign(id));
    this.#serving = true;
    for (const image of this.#images.values())
      if (!image.removed) await node.store.pin(image.id, [image.stored.layerId]);
    this.#count('killed');
  }

  /** Counters end with the store. */
  async #note(): Promise<void> {
    const stats = await this.#rig.node.store.stats();
    this.#evictedBytes += stats.evictedBytes;
    this.#damagedReads += stats.damagedReads;
  }

  async read(): Promise<void> {
    const image = this.#pick();
    if (image === undefined) return;
    const { layer, addresses } = image.stored;
    const { chunks, entries } = layer.index;
    const file = layer.files[this.#random(layer.files.length)]!;
    const entry = entries.name.indexOf(file.name);
    const at = this.#random(entries.chunkCount[entry]!);
    const chunk = entries.firstChunk[entry]! + at;
    const blocks = Math.ceil(chunks.length[chunk]! / BLOCK);
    const first = this.#random(blocks);
    const count = 1 + this.#random(blocks - first);
    const expected = Buffer.alloc(count * BLOCK);
    const start = at * SIZES.chunkBytes + first * BLOCK;
    file.content.copy(
      expected,
      0,
      start,
      Math.min(start + expected.length, at * SIZES.chunkBytes + chunks.length[chunk]!),
    );
    const wasServing = this.#serving;
    const kills = this.#done.killed;
    const offset = addresses[chunk]! + first * BLOCK;
    const result = await this.#reader.read({ path: image.device, offset, length: expected.length });
    const what = `image ${image.id}, ${file.name}, chunk ${at}, blocks ${first}+${count}`;
    if (result.bytesRead < 0) {
      this.#refused++;
      const mayFail = image.removed || !wasServing || !this.#serving || kills !== this.#done.killed;
      if (!mayFail) this.#wrong.push(`${what}: ${result.code}`);
      return;
    }
    this.#reads++;
    // A device that was let go meanwhile is empty, or another image's.
    if (!this.#images.has(image.id)) return;
    if (result.sha256 !== createHash('sha256').update(expected).digest('hex')) this.#wrong.push(`${what}: wrong bytes`);
  }

  async run(untilMs: number): Promise<void> {
    let running = true;
    this.#serving = true;
    const readers = Array.from({ length: READERS }, async () => {
      while (running) {
        await this.read();
        // With nothing to read yet, others must have their turn.
        await new Promise((resolve) => setImmediate(resolve));
      }
    });
    const steps = [
      ...Array.from({ length: 4 }, () => this.add),
      ...Array.from({ length: 2 }, () => this.remove),
      ...Array.from({ length: 3 }, () => this.letGo),
      ...Array.from({ length: 4 }, () => this.evict),
      ...Array.from({ length: 3 }, () => this.collect),
      ...Array.from({ length: 2 }, () => this.flush),
      this.kill,
    ];
    try {
      while (performance.now() < untilMs && this.#wrong.length === 0) {
        await steps[this.#random(steps.length)]!.call(this);
        await new Promise((resolve) => setTimeout(resolve, this.#random(30)));
      }
    } finally {
      running = false;
      await Promise.all(readers);
    }
    if (this.#wrong.length > 0) return;
    // At last all that is left, whole.
    for (const image of this.#images.values()) if (!image.removed) await this.#rig.mustEqual(image.stored);
  }

  async close(): Promise<void> {
    this.#serving = false;
    await this.#transport?.close();
    for (const image of [...this.#images.values()]) await this.#detach(image);
  }

  async result(seed: number): Promise<StressResult> {
    await this.#note();
    return {
      seed,
      done: this.#done,
      reads: this.#reads,
      refused: this.#refused,
      wrong: this.#wrong,
      evictedBytes: this.#evictedBytes,
      damagedReads: this.#damagedReads,
    };
  }
}

/** Layers that share most of their files. */
async function overlapping(random: (below: number) => number): Promise<TestLayer[]> {
  const files: TestFile[] = Array.from({ length: FILES }, (_, i) => ({
    name: `f${i}`,
    content: noise(`stress ${i}`, 1 + random(600 * KiB)),
  }));
  const layers: TestLayer[] = [];
  for (let i = 0; i < LAYERS; i++) {
    const own = { name: 'own', content: noise(`own ${i}`, 1 + random(200 * KiB)) };
    layers.push(await layerOf([own, ...files.filter(() => random(3) === 0)], SIZES));
  }
  return layers;
}

/** Runs for so long, or until something is wrong. Leaves nothing behind. */
export async function stressSpace(options: { seconds: number; seed: number }): Promise<StressResult> {
  const random = seededRandom(options.seed);
  const made = await overlapping(random);
  const reader = await startDirectReader({ threads: READERS + 1, timeoutMs: 60_000 });
  const rig = await LoaderRig.create({}, Stress.storeOptions);
  const stress = new Stress(random, rig, reader, made);
  try {
    await stress.serve();
    await stress.run(performance.now() + options.seconds * 1000);
    return await stress.result(options.seed);
  } finally {
    await stress.close();
    await reader.close();
    await rig.remove();
  }
}

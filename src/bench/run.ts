// Runs a whole benchmark: cells of image and link, pairs in random order within each, floors and resource traces; writes
// every figure down as soon as it is there. What is measured comes from the caller: an operator's node (the verb
// `bench`) or a private world (`make bench`).
import { DedupError } from '../errors.ts';
import type { BenchTarget, Contender } from './contenders.ts';
import { controlRoundTrips, floorMs, type LinkProbe, warmRunMs } from './floor.ts';
import type { Meter } from './meter.ts';
import { measureNeeded, type NeededResult } from './needed-run.ts';
import type { BenchNode } from './node-commands.ts';
import { ResourceSampler, type SamplerOptions } from './resources.ts';
import type { BenchLink, ColdStartResult } from './result.ts';
import type { ResultFile } from './result-file.ts';
import { pairOrder } from './schedule.ts';
import { coldStart, type StartSetup } from './start.ts';

/** One image on one link. */
export interface BenchCell {
  readonly target: BenchTarget;
  /** Digests of the image's layers, bottom to top. */
  readonly layers: readonly string[];
  readonly link: BenchLink;
  readonly pairs: number;
}

export interface FloorPlan {
  readonly probe: LinkProbe;
  /** overlayfs, for warm runs. */
  readonly yardstick: Contender;
  /** Ours, for the bytes needed. */
  readonly ours: Contender;
  /** Where dedupd keeps layer indexes. */
  readonly indexDirectory: string;
}

export interface BenchPlan {
  readonly seed: number;
  readonly cells: readonly BenchCell[];
  readonly contenders: readonly Contender[];
  readonly node: BenchNode;
  readonly meter: Meter;
  readonly timeoutMs: number;
  readonly signal: AbortSignal;
  /** StartSetup.diskWrites of every start. */
  readonly diskWrites?: () => number;
  /** Makes the link what the cell says. */
  readonly enterLink: (link: BenchLink) => Promise<void>;
  /** Absent: no floors. */
  readonly floor?: FloorPlan;
  /** Absent: no resource traces. One start of each snapshotter for each image, on its first link. */
  readonly sampler?: SamplerOptions;
  readonly say: (text: string) => void;
}

/** Of a start with as good as no bytes: below this part of the image a cold overlayfs pull was not cold. */
const COLD_RATIO = 0.5;

export async function runBench(plan: BenchPlan, file: ResultFile): Promise<void> {
  const runner = new Runner(plan, file);
  const images = new Set<string>();
  for (const cell of plan.cells) {
    await plan.enterLink(cell.link);
    await runner.pairs(cell);
    await runner.floor(cell);
    if (!images.has(cell.target.image.name)) await runner.traces(cell);
    images.add(cell.target.image.name);
  }
}

class Runner {
  readonly #plan: BenchPlan;
  readonly #file: ResultFile;
  readonly #needed = new Map<string, NeededResult>();
  readonly #warm = new Map<string, number>();
  readonly #links = new Map<string, { roundTripMs: number; bytesPerSecond: number }>();
  readonly #progress: Progress;
  #warned = false;

  constructor(plan: BenchPlan, file: ResultFile) {
    this.#plan = plan;
    this.#file = file;
    let starts = 0;
    for (const { target, link, pairs } of plan.cells) {
      for (let pair = 0; pair < pairs; pair++) {
        for (const { name } of plan.contenders) {
          if (!file.has({ snapshotter: name, image: target.image.name, link: link.name, pair })) starts++;
        }
      }
    }
    this.#progress = new Progress(starts, plan.say);
  }

  #setup(contender: Contender, target: BenchTarget): StartSetup {
    const { node, meter, timeoutMs, signal, diskWrites } = this.#plan;
    const disk = diskWrites === undefined ? {} : { diskWrites };
    return { node, contender, target, meter, timeoutMs, signal, ...disk };
  }

  async pairs({ target, link, pairs }: BenchCell): Promise<void> {
    const { contenders, seed } = this.#plan;
    const image = target.image.name;
    for (let pair = 0; pair < pairs; pair++) {
      for (const contender of pairOrder(contenders, seed, `${image}\n${link.name}`, pair)) {
        if (this.#file.has({ snapshotter: contender.name, image, link: link.name, pair })) continue;
        this.#plan.signal.throwIfAborted();
        const { result } = await coldStart(this.#setup(contender, target));
        this.#checkCold(contender, target, result.wireBytes);
        await this.#file.addStart({ ...result, link: link.name, pair });
        this.#progress.done({ ...result, link: link.name, pair });
      }
    }
  }

  #checkCold(contender: Contender, target: BenchTarget, wireBytes: number): void {
    if (this.#warned || contender.plugin !== 'overlayfs') return;
    if (wireBytes >= target.image.compressedBytes * COLD_RATIO) return;
    this.#warned = true;
    this.#plan.say(
      `warning: pulling ${target.image.name} brought ${wireBytes} of ${target.image.compressedBytes} bytes. Its layers are ` +
        `on this node already, in another namespace of containerd: these figures are not of a cold start`,
    );
  }

  /** A floor that cannot be had (a layer without index, no registry answer) is said and left out. */
  async floor(cell: BenchCell): Promise<void> {
    const { floor, say } = this.#plan;
    const image = cell.target.image.name;
    const had = this.#file.result.floors.some((known) => known.image === image && known.link === cell.link.name);
    if (floor === undefined || had) return;
    this.#plan.signal.throwIfAborted();
    try {
      const needed = await this.#neededOf(cell, floor);
      const warm = this.#warm.get(image) ?? (await warmRunMs(this.#setup(floor.yardstick, cell.target)));
      this.#warm.set(image, warm);
      const link = this.#links.get(cell.link.name) ?? {
        roundTripMs: await floor.probe.roundTripMs(),
        bytesPerSecond: await floor.probe.bytesPerSecond(cell.target),
      };
      this.#links.set(cell.link.name, link);
      const terms = {
        image,
        link: cell.link.name,
        ...link,
        controlRoundTrips: controlRoundTrips(cell.link),
        neededBytes: needed.neededBytes,
        touchedBytes: needed.touchedBytes,
        // The reads of a start depend on each other, but who knows them all can ask at once; the first cannot be saved.
        dependentMisses: 1,
        warmRunMs: warm,
      };
      await this.#file.addFloor({ ...terms, totalMs: floorMs(terms) });
      say(`${image}, ${cell.link.name}: floor ${(floorMs(terms) / 1000).toFixed(2)} s`);
    } catch (error) {
      this.#plan.signal.throwIfAborted();
      const reason = error instanceof DedupError ? `${error.message} ${error.hint ?? ''}` : String(error);
      say(`${image}, ${cell.link.name}: no floor: ${reason}`);
    }
  }

  async #neededOf(cell: BenchCell, floor: FloorPlan): Promise<NeededResult> {
    const image = cell.target.image;
    const known = this.#needed.get(image.name);
    if (known !== undefined) return known;
    const { layers } = cell;
    const setup = { ...this.#setup(floor.ours, cell.target), layers, indexDirectory: floor.indexDirectory };
    const needed = await measureNeeded(setup);
    this.#needed.set(image.name, needed);
    if (needed.unknownBytes > 0) {
      this.#plan.say(`${image.name}: ${needed.unknownBytes} touched bytes are in no layer's index and not counted`);
    }
    if (image.uncompressedBytes === 0) {
      await this.#file.setImage({ ...image, uncompressedBytes: needed.uncompressedBytes });
    }
    return needed;
  }

  async traces({ target, link }: BenchCell): Promise<void> {
    const { sampler, contenders, say } = this.#plan;
    if (sampler === undefined) return;
    for (const contender of contenders) {
      const image = target.image.name;
      const had = this.#file.result.resources.some(
        (known) => known.image === image && known.link === link.name && known.snapshotter === contender.name,
      );
      if (had) continue;
      this.#plan.signal.throwIfAborted();
      const { trace } = await coldStart({ ...this.#setup(contender, target), sampler: new ResourceSampler(sampler) });
      if (trace !== undefined) await this.#file.addTrace({ ...trace, link: link.name });
      say(`${image}, ${link.name}: resources of ${contender.name} recorded`);
    }
  }
}

/** Says what was measured and how long the rest may take. */
class Progress {
  readonly #total: number;
  readonly #say: (text: string) => void;
  readonly #startedMs = performance.now();
  #done = 0;

  constructor(total: number, say: (text: string) => void) {
    this.#total = total;
    this.#say = say;
  }

  done({ snapshotter, image, link, pair, phases, wireBytes, requests }: Omit<ColdStartResult, 'order'>): void {
    this.#done++;
    const leftMs = ((performance.now() - this.#startedMs) / this.#done) * (this.#total - this.#done);
    const left = this.#done === this.#total ? '' : `, about ${Math.ceil(leftMs / 60_000)} min left`;
    this.#say(
      `[${this.#done}/${this.#total}${left}] ${image}, ${link}, pair ${pair + 1}, ${snapshotter}: ` +
        `${(phases.totalMs / 1000).toFixed(2)} s, ${(wireBytes / 1e6).toFixed(1)} MB in ${requests} requests`,
    );
  }
}

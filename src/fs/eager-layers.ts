// Layers that are read whole because nothing says what is in them: several at once, each decompressed once, indexed on the
// way, its chunks kept. Called by LayerIntake for pulls of our own; two pulls that want one layer share the reading.
import PQueue from 'p-queue';
import { DedupError } from '../errors.ts';
import { orAborted } from '../or-aborted.ts';
import type { LayerRecord } from './chunks/index-protocol.ts';
import type { LayerStream, WantedLayer } from './layer-intake.ts';
import type { BlobId, Repository } from './registry/blob-reader.ts';

/**
 * Layers read at once. Inflating one keeps a core busy, so two use a small node; the others hide the ends of layers and the
 * registry's pauses. Each holds some 20 MiB.
 */
const READ_AT_ONCE = 3;

export interface EagerLayersOptions {
  readonly takeIn: (
    wanted: WantedLayer,
    blob: BlobId,
    source: LayerStream,
    progress: (bytesDone: number) => void,
    signal: AbortSignal,
  ) => Promise<LayerRecord>;
  /** Aborted when the daemon stops. */
  readonly stop: AbortSignal;
}

/** One layer being read, for everybody who waits for it. */
interface Reading {
  readonly work: Promise<LayerRecord>;
  readonly give: AbortController;
  readonly watchers: Set<(bytesDone: number) => void>;
  users: number;
}

export class EagerLayers {
  readonly #options: EagerLayersOptions;
  readonly #queue = new PQueue({ concurrency: READ_AT_ONCE });
  readonly #readings = new Map<string, Reading>();

  constructor(options: EagerLayersOptions) {
    this.#options = options;
  }

  get isReading(): boolean {
    return this.#readings.size > 0;
  }

  /**
   * The layer, stored whole. Large layers come first: they decide when the last one is here. It is given up when everybody
   * who asked for it has. Errors: those of LayerIntake.takeIn; CANCELLED through `signal`.
   */
  async read(
    wanted: WantedLayer,
    blob: BlobId,
    repository: Repository,
    progress: (bytesDone: number) => void,
    signal: AbortSignal,
  ): Promise<LayerRecord> {
    signal.throwIfAborted();
    const key = `${wanted.key.scope} ${blob.digest}`;
    const reading = this.#readings.get(key) ?? this.#begin(key, wanted, blob, repository);
    reading.users++;
    reading.watchers.add(progress);
    const left = () => new DedupError('CANCELLED', `reading layer ${blob.digest} was given up`);
    try {
      return await orAborted(reading.work, signal, left);
    } finally {
      reading.watchers.delete(progress);
      if (--reading.users === 0) {
        reading.give.abort(new DedupError('CANCELLED', 'nobody waits for the layer any more'));
        // Whoever comes next must not get what is being given up.
        if (this.#readings.get(key) === reading) this.#readings.delete(key);
      }
    }
  }

  #begin(key: string, wanted: WantedLayer, blob: BlobId, repository: Repository): Reading {
    const give = new AbortController();
    const signal = AbortSignal.any([give.signal, this.#options.stop]);
    const watchers = new Set<(bytesDone: number) => void>();
    const work = this.#queue.add(
      () => {
        signal.throwIfAborted();
        const source = { stream: repository.readAll(blob, signal), verifiedStream: true };
        const progress = (bytesDone: number): void => {
          for (const watcher of watchers) watcher(bytesDone);
        };
        return this.#options.takeIn(wanted, blob, source, progress, signal);
      },
      { priority: blob.size },
    );
    const reading = { work, give, watchers, users: 0 };
    this.#readings.set(key, reading);
    const ended = (): void => {
      if (this.#readings.get(key) === reading) this.#readings.delete(key);
    };
    work.then(ended, ended);
    return reading;
  }
}

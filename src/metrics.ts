// What dedupd counts, as Prometheus reads it. The data path tells it how long a read waited, and nothing else: every other
// number is asked for when somebody scrapes. It opens no port (fs/exporter.ts does) and knows nothing of where numbers
// come from.
import { readdirSync } from 'node:fs';
import { Counter, Gauge, Histogram, Registry } from 'prom-client';

/** Numbers of one moment. Those of counters count from the start of the process. */
export interface NumbersNow {
  /** Reads answered without waiting, those that waited for a fetch, and those answered with an error. */
  readonly hits: number;
  readonly misses: number;
  readonly failedReads: number;
  /** Bytes fetched ahead: read since, wanted before they were here, given up unread, and not read so far. */
  readonly prefetchUsefulBytes: number;
  readonly prefetchLateBytes: number;
  readonly prefetchWastedBytes: number;
  readonly prefetchUnreadBytes: number;
  /** Spans that prefetch has not asked for yet. */
  readonly prefetchQueueSpans: number;
  /** Spans asked for and not here yet, whoever wants them. */
  readonly waitingSpans: number;
  /** Bytes and requests of ranges of layers. */
  readonly dataBytes: number;
  readonly dataRequests: number;
  /** Of everything else asked of registries. Bytes are undefined when they cannot be told right now. */
  readonly controlBytes: number | undefined;
  readonly controlRequests: number;
  readonly presentBytes: number;
  readonly chunks: number;
  readonly imagesMounted: number;
  readonly tracesRecorded: number;
  readonly tracesReplayed: number;
}

interface Definition {
  readonly kind: 'counter' | 'gauge';
  readonly name: string;
  readonly help: string;
  /** Name of the one label; absent where there is one number only. */
  readonly label?: string;
  /** One number, or one for each value of the label; undefined leaves that series as it was. */
  readonly values: (now: NumbersNow) => number | Readonly<Record<string, number | undefined>>;
}

/** Once: the wall clock may be set, and a start that moves looks like a restart. */
const STARTED_SECONDS = Math.round(performance.timeOrigin / 1000);

const DEFINITIONS: readonly Definition[] = [
  {
    kind: 'counter',
    name: 'dedup_reads_total',
    help: 'Reads of the kernel: answered at once, having waited for a fetch, answered with an error.',
    label: 'result',
    values: ({ hits, misses, failedReads }) => ({ hit: hits, miss: misses, failed: failedReads }),
  },
  {
    kind: 'counter',
    name: 'dedup_prefetch_bytes_total',
    help: 'Bytes fetched ahead: read later, wanted before they were here, or not read until a recording of their layers ended.',
    label: 'outcome',
    values: (now) => ({
      useful: now.prefetchUsefulBytes,
      late: now.prefetchLateBytes,
      wasted: now.prefetchWastedBytes,
    }),
  },
  {
    kind: 'gauge',
    name: 'dedup_prefetch_unread_bytes',
    help: 'Bytes fetched ahead that nobody has read so far.',
    values: (now) => now.prefetchUnreadBytes,
  },
  {
    kind: 'gauge',
    name: 'dedup_prefetch_queue_spans',
    help: 'Spans that prefetch will ask for and has not yet.',
    values: (now) => now.prefetchQueueSpans,
  },
  {
    kind: 'gauge',
    name: 'dedup_fetch_waiting_spans',
    help: 'Spans that were asked for and are not here yet.',
    values: (now) => now.waitingSpans,
  },
  {
    kind: 'counter',
    name: 'dedup_wire_bytes_total',
    help: 'Bytes received from registries: ranges of layers, and everything else.',
    label: 'kind',
    values: ({ dataBytes, controlBytes }) => ({ data: dataBytes, control: controlBytes }),
  },
  {
    kind: 'counter',
    name: 'dedup_registry_requests_total',
    help: 'Requests to registries: for ranges of layers, and for everything else.',
    label: 'kind',
    values: ({ dataRequests, controlRequests }) => ({ data: dataRequests, control: controlRequests }),
  },
  {
    kind: 'gauge',
    name: 'dedup_store_present_bytes',
    help: 'Bytes of chunks that are in the store.',
    values: (now) => now.presentBytes,
  },
  {
    kind: 'gauge',
    name: 'dedup_store_chunks',
    help: 'Distinct chunks that the layers on this node name, here or not.',
    values: (now) => now.chunks,
  },
  {
    kind: 'gauge',
    name: 'dedup_images_mounted',
    help: 'Merged images that are mounted.',
    values: (now) => now.imagesMounted,
  },
  {
    kind: 'counter',
    name: 'dedup_traces_recorded_total',
    help: 'Access traces that were recorded.',
    values: (now) => now.tracesRecorded,
  },
  {
    kind: 'counter',
    name: 'dedup_traces_replayed_total',
    help: 'Access traces that were replayed at a pull or mount.',
    values: (now) => now.tracesReplayed,
  },
  // Of prom-client's own set only these, under the names of every Prometheus client: the others watch the event loop and
  // the collector all the time, or read files of /proc for numbers nobody asked for.
  {
    kind: 'gauge',
    name: 'process_resident_memory_bytes',
    help: 'Resident memory of dedupd.',
    values: () => process.memoryUsage.rss(),
  },
  {
    kind: 'counter',
    name: 'process_cpu_seconds_total',
    help: 'Processor time of dedupd, of the program and of the kernel for it.',
    values: () => {
      const { user, system } = process.cpuUsage();
      return (user + system) / 1e6;
    },
  },
  {
    kind: 'gauge',
    name: 'process_open_fds',
    help: 'Files, sockets and devices that dedupd holds open.',
    // One of them is the folder while it is read.
    values: () => readdirSync('/proc/self/fd').length - 1,
  },
  {
    kind: 'gauge',
    name: 'process_start_time_seconds',
    help: 'When dedupd started, in seconds since 1970.',
    values: () => STARTED_SECONDS,
  },
];

/** From a registry next door to the deadline of a read (LazyLoader), seconds. */
const WAIT_BUCKETS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];

const NOTHING: NumbersNow = {
  hits: 0,
  misses: 0,
  failedReads: 0,
  prefetchUsefulBytes: 0,
  prefetchLateBytes: 0,
  prefetchWastedBytes: 0,
  prefetchUnreadBytes: 0,
  prefetchQueueSpans: 0,
  waitingSpans: 0,
  dataBytes: 0,
  dataRequests: 0,
  controlBytes: 0,
  controlRequests: 0,
  presentBytes: 0,
  chunks: 0,
  imagesMounted: 0,
  tracesRecorded: 0,
  tracesReplayed: 0,
};

type Setter = (labels: Readonly<Record<string, string>>, value: number) => void;

/** Sets a counter to a number that was counted elsewhere. */
function counterSetter(definition: Definition, registers: Registry[]): Setter {
  const { name, help, label } = definition;
  const counter = new Counter({ name, help, labelNames: label === undefined ? [] : [label], registers });
  const said = new Map<string, number>();
  return (labels, value) => {
    // Never less than was said before: Prometheus would take it for a restart and count everything again. A difference
    // of two counts that do not move in the same moment can be less for a while.
    const key = Object.values(labels).join();
    const before = said.get(key) ?? 0;
    counter.inc(labels, Math.max(0, value - before));
    said.set(key, Math.max(value, before));
  };
}

function gaugeSetter(definition: Definition, registers: Registry[]): Setter {
  const { name, help, label } = definition;
  const gauge = new Gauge({ name, help, labelNames: label === undefined ? [] : [label], registers });
  return (labels, value) => gauge.set(labels, value);
}

export class Metrics {
  readonly #registry = new Registry();
  readonly #wait: Histogram;
  readonly #setters: readonly { readonly definition: Definition; readonly set: Setter }[];
  #source: () => NumbersNow | Promise<NumbersNow> = () => NOTHING;
  #scrape: Promise<string> | undefined;

  constructor() {
    const registers = [this.#registry];
    this.#wait = new Histogram({
      name: 'dedup_read_wait_seconds',
      help: 'Time that reads took which had to wait for a fetch.',
      buckets: WAIT_BUCKETS,
      registers,
    });
    this.#setters = DEFINITIONS.map((definition) => ({
      definition,
      set: (definition.kind === 'counter' ? counterSetter : gaugeSetter)(definition, registers),
    }));
  }

  /** A read had to wait for a fetch, this many milliseconds. Cheap: the data path calls it. */
  waited(ms: number): void {
    this.#wait.observe(ms / 1000);
  }

  /** Where numbers come from from now on; asked once a scrape. Without it they are 0. */
  collect(source: () => NumbersNow | Promise<NumbersNow>): void {
    this.#source = source;
  }

  /** Of what text() gives, for the header Content-Type. */
  get contentType(): string {
    return this.#registry.contentType;
  }

  /**
   * Every metric in Prometheus' text format. Scrapes that come while one is under way get the same text: asking costs a
   * query of index.db. Errors: those of the source.
   */
  text(): Promise<string> {
    this.#scrape ??= this.#read().finally(() => {
      this.#scrape = undefined;
    });
    return this.#scrape;
  }

  async #read(): Promise<string> {
    const now = await this.#source();
    for (const { definition, set } of this.#setters) {
      const { label } = definition;
      const values = definition.values(now);
      if (typeof values === 'number') set({}, values);
      else if (label !== undefined)
        for (const [value, number] of Object.entries(values)) if (number !== undefined) set({ [label]: value }, number);
    }
    return await this.#registry.metrics();
  }
}

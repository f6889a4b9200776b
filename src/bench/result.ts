// What a benchmark run leaves behind, as it is written to JSON. Made by the runner, read by the report (Markdown, charts)
// and by the gate in CI; holds figures only, no judgement.

/** One container image under test and what is run in it. */
export interface BenchImage {
  readonly name: string;
  /** What it is made of, for people: "Debian bookworm, python3, python3-numpy". */
  readonly composition: string;
  /** Compressed bytes of all layers as overlayfs pulls them. */
  readonly compressedBytes: number;
  /** Bytes of the layers' tars. */
  readonly uncompressedBytes: number;
  readonly layers: number;
  readonly command: readonly string[];
  /** When the container counts as ready. */
  readonly ready: Ready;
}

export type Ready =
  | { readonly kind: 'exit' }
  /** A line of standard output or error that matches this regular expression. */
  | { readonly kind: 'line'; readonly pattern: string }
  /** A TCP port that the container's network namespace listens on. */
  | { readonly kind: 'port'; readonly port: number };

/** An emulated link, or undefined members where it is the network as it is. */
export interface BenchLink {
  /** "20 ms, 1 Gbit/s"; "loopback". */
  readonly name: string;
  /** Round trip, milliseconds. */
  readonly roundTripMs?: number;
  readonly bitsPerSecond?: number;
  readonly lossRatio?: number;
  readonly tls: boolean;
}

/** Consumption of one process during one start. */
export interface ProcessUse {
  readonly name: string;
  readonly cpuSeconds: number;
  /** Of it by threads that only get what nobody else wants (SCHED_IDLE) and are alive at the end. */
  readonly idleCpuSeconds?: number;
  /** Proportional set size when the container was ready, bytes. */
  readonly pssBytes: number;
  /** Bytes it caused to be written to disks (proc(5), io: write_bytes). */
  readonly writtenBytes: number;
}

/** One cold start. Times in milliseconds from the beginning of the pull, on one monotonic clock. */
export interface ColdStartResult {
  readonly snapshotter: string;
  readonly image: string;
  readonly link: string;
  /** Position in the run, from 0: says in which order things were measured. */
  readonly order: number;
  readonly pair: number;
  readonly phases: {
    /** Part of the pull before the first layer byte was asked for; undefined where it cannot be told. */
    readonly controlMs?: number;
    readonly pullMs: number;
    readonly createMs: number;
    /** From `task start` to ready. */
    readonly runMs: number;
    readonly totalMs: number;
  };
  /** Seen at the registry. */
  readonly requests: number;
  readonly wireBytes: number;
  readonly processes: readonly ProcessUse[];
  /** What the snapshotter's and the content store's directories grew by, bytes. */
  readonly diskBytes: number;
  /** Bytes that reached the machine's disks until everything of the start was written back; absent where not measured. */
  readonly deviceBytes?: number;
  /** What the snapshotter's own counters grew by until the image was gone again: says why, and is never compared. */
  readonly counters?: Readonly<Record<string, number>>;
  /** Requests at the registry over time, for the time line. */
  readonly requestTimes?: readonly RequestTime[];
}

export interface RequestTime {
  readonly startMs: number;
  readonly endMs: number;
  readonly bytes: number;
  readonly kind: 'manifest' | 'config' | 'index' | 'window' | 'layer' | 'token' | 'other';
}

/** The least a cold start can take, with its terms, each measured apart from the product (docs/benchmarks.md). */
export interface Floor {
  readonly image: string;
  readonly link: string;
  readonly roundTripMs: number;
  readonly bytesPerSecond: number;
  readonly controlRoundTrips: number;
  /** Compressed bytes of the spans that hold pages touched between start and ready. */
  readonly neededBytes: number;
  /** Bytes of the touched pages themselves. */
  readonly touchedBytes: number;
  readonly dependentMisses: number;
  /** Median of warm overlayfs starts, create to ready. */
  readonly warmRunMs: number;
  readonly totalMs: number;
}

/** One sample of the machine and the processes during a start (experiment 1). */
export interface ResourceSample {
  readonly atMs: number;
  /** Cores in use, 0 to the number of cores. */
  readonly cpuCores: number;
  readonly memoryBytes: number;
  readonly diskWriteBytesPerSecond: number;
  readonly networkBytesPerSecond: number;
}

export interface ResourceTrace {
  readonly snapshotter: string;
  readonly image: string;
  readonly link: string;
  /** Ends of the phases, milliseconds from the beginning. */
  readonly marks: readonly { readonly name: string; readonly atMs: number }[];
  readonly samples: readonly ResourceSample[];
}

export interface Machine {
  readonly cores: number;
  readonly cpuModel: string;
  readonly memoryBytes: number;
  readonly kernel: string;
  readonly versions: Readonly<Record<string, string>>;
}

export interface BenchResult {
  readonly format: 'dedup-snapshotter-bench/1';
  /** RFC 3339. */
  readonly startedAt: string;
  readonly seed: number;
  readonly machine: Machine;
  readonly images: readonly BenchImage[];
  readonly links: readonly BenchLink[];
  /** In the order in which tables show them; the first is the yardstick. */
  readonly snapshotters: readonly string[];
  readonly starts: readonly ColdStartResult[];
  readonly floors: readonly Floor[];
  readonly resources: readonly ResourceTrace[];
}

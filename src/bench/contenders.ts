// The snapshotters that are compared: containerd's overlayfs as the yardstick, ours, and any other by its socket. Each is
// a few commands and the processes and directories to look at; measuring is the same for all (start.ts).
import { DedupError } from '../errors.ts';
import type { ImageBlobs } from './meter.ts';
import { type BenchNode, ctr, splitCommand } from './node-commands.ts';
import { type Daemon, socketOwner } from './process-use.ts';
import type { BenchImage } from './result.ts';

/** An image under test, with where it is and how to tell its blobs apart. */
export interface BenchTarget {
  readonly image: BenchImage;
  /** The image as any snapshotter pulls it. */
  readonly plain: string;
  /** The same image with what ours needs to load it lazily; may be the same reference. */
  readonly lazy: string;
  readonly blobs: ImageBlobs;
  /** Called after the caches were dropped, before the clock starts: what is not this node's cache may be warmed. */
  readonly prepare?: () => Promise<void>;
}

export interface Contender {
  /** In tables. */
  readonly name: string;
  /** containerd's name of the snapshotter. */
  readonly plugin: string;
  reference(target: BenchTarget): string;
  pullCommand(target: BenchTarget): string[];
  /** Processes whose consumption is reported. */
  daemons(): Promise<readonly Daemon[]>;
  /** What grows when an image arrives. */
  readonly directories: readonly string[];
  /** Called before caches are dropped: puts on the node what this contender may know of earlier starts. */
  readonly prepare?: (target: BenchTarget) => Promise<void>;
  /** Called when the image is gone again: what its own counters grew by since `prepare`. */
  readonly counters?: (target: BenchTarget) => Promise<Readonly<Record<string, number>>>;
}

/** What all contenders of one node share. */
export interface ContenderNode extends BenchNode {
  /** Flags of `ctr image pull` for the registry, e.g. ['--plain-http']. */
  readonly pullFlags: readonly string[];
  /** containerd's root directory. */
  readonly containerdRoot: string;
  containerd(): Promise<Daemon>;
}

const contentOf = (node: ContenderNode): string => `${node.containerdRoot}/io.containerd.content.v1.content`;

function ctrPull(node: ContenderNode, plugin: string, reference: string): string[] {
  return ctr(node, 'image', 'pull', ...node.pullFlags, '--snapshotter', plugin, reference);
}

export function overlayfs(node: ContenderNode): Contender {
  return {
    name: 'overlayfs',
    plugin: 'overlayfs',
    reference: (target) => target.plain,
    pullCommand: (target) => ctrPull(node, 'overlayfs', target.plain),
    daemons: async () => [await node.containerd()],
    directories: [`${node.containerdRoot}/io.containerd.snapshotter.v1.overlayfs`, contentOf(node)],
  };
}

export interface DedupOptions {
  /** `dedup-snapshotter --config …`. */
  readonly program: readonly string[];
  /** Flags of rpull for the registry, e.g. credentials. */
  readonly pullFlags: readonly string[];
  readonly root: string;
  /** The service and dedupd. */
  daemons(): Promise<readonly Daemon[]>;
  /** Default: "dedup". */
  readonly plugin?: string;
}

export function dedup(node: ContenderNode, options: DedupOptions): Contender {
  const plugin = options.plugin ?? 'dedup';
  return {
    name: 'dedup',
    plugin,
    reference: (target) => target.lazy,
    pullCommand: (target) => [
      ...node.inside,
      ...options.program,
      ...['rpull', '--address', node.address, '--namespace', node.namespace, '--snapshotter', plugin],
      ...options.pullFlags,
      target.lazy,
    ],
    daemons: async () => [await node.containerd(), ...(await options.daemons())],
    directories: [options.root, contentOf(node)],
  };
}

/** Another snapshotter, as `--peer NAME=SOCKET[,PULL-COMMAND]` says it. */
export interface PeerSpec {
  readonly name: string;
  readonly socket: string;
  /** Words with {image} {snapshotter} {address} {namespace}; empty: `ctr image pull --snapshotter NAME`. */
  readonly pullCommand: readonly string[];
}

/** Errors: INVALID_ARGUMENT with the form expected. */
export function parsePeer(text: string): PeerSpec {
  const match = /^([a-zA-Z0-9][\w.-]*)=(\/[^,]+)(?:,(.*))?$/s.exec(text);
  if (match === null) {
    throw new DedupError('INVALID_ARGUMENT', `--peer ${JSON.stringify(text)} is not NAME=SOCKET[,PULL-COMMAND]`, {
      hint: 'for example --peer "stargz=/run/stargz.sock,ctr-remote -a {address} -n {namespace} image rpull {image}"',
    });
  }
  const [, name = '', socket = '', command = ''] = match;
  return { name, socket, pullCommand: splitCommand(command) };
}

/** `directories`: where it keeps its files, for the disk column; may be none. */
export function peer(node: ContenderNode, spec: PeerSpec, directories: readonly string[] = []): Contender {
  const values: Readonly<Record<string, string>> = {
    snapshotter: spec.name,
    address: node.address,
    namespace: node.namespace,
  };
  return {
    name: spec.name,
    plugin: spec.name,
    reference: (target) => target.plain,
    pullCommand: (target) => {
      if (spec.pullCommand.length === 0) return ctrPull(node, spec.name, target.plain);
      const words = spec.pullCommand.map((word) =>
        word.replace(/\{(\w+)\}/g, (whole, name: string) =>
          name === 'image' ? target.plain : (values[name] ?? whole),
        ),
      );
      return [...node.inside, ...words];
    },
    daemons: async () => {
      const pid = socketOwner(spec.socket);
      const containerd = await node.containerd();
      return pid === undefined ? [containerd] : [containerd, { name: spec.name, pid }];
    },
    directories: [...directories, contentOf(node)],
  };
}

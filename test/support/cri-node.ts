// A LazyNode whose containerd serves CRI with snapshotter `dedup`, a sandbox image for pods, and a client: what a kubelet
// meets on a node of ours.
import { rm } from 'node:fs/promises';
import { CriClient } from './cri.ts';
import { busyboxEntries, makeImage, pushLayout } from './images.ts';
import { LazyNode } from './lazy-node.ts';

export interface CriNode {
  readonly node: LazyNode;
  readonly cri: CriClient;
  /** What CRI pulls by itself for the first pod. */
  readonly sandboxImage: string;
  /** Removes all pods and ends everything. */
  stop(): Promise<void>;
}

/** Starts one; snapshot annotations are on. `config`: more of the product's. */
export async function startCriNode(config: Readonly<Record<string, unknown>> = {}): Promise<CriNode> {
  let sandboxImage = '';
  const node = await LazyNode.start({
    // Bytes are counted: only what is read counts here.
    config: { prefetch: { enabled: false }, ...config },
    // CRI works in this namespace whatever it is told.
    containerd: { namespace: 'k8s.io' },
    prepare: async ({ registry }) => {
      const layers = [{ entries: await busyboxEntries(['sleep']) }];
      const pause = await makeImage({ layers, config: { Entrypoint: ['/bin/sleep', '100000'] } });
      sandboxImage = await pushLayout(pause.dir, 'latest', registry.host, 'pause');
      await rm(pause.dir, { recursive: true });
      return { cri: { snapshotter: 'dedup', sandboxImage } };
    },
  });
  const cri = new CriClient(node.containerd.address, await node.containerd.scratch('logs'));
  return {
    node,
    cri,
    sandboxImage,
    stop: async () => {
      await cri.close();
      await node.stop();
    },
  };
}

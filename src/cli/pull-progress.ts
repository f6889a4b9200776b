// What a pull shows of itself while it goes on: one line per layer, for logs and pipes. For terminals see pull-bar.ts.
import type { PullEvent } from '../snapshotter/dedupd-client.ts';
import { formatBytes } from '../units.ts';

export interface Progress {
  show(event: PullEvent): void;
  end(): void;
}

const WORDS = {
  present: 'already here',
  lazy: 'lazy, nothing fetched',
  unpacked: 'unpacked',
  unpacking: 'unpacking',
} as const;

export class LineProgress implements Progress {
  #layers: readonly { readonly digest: string; readonly size: number }[] = [];

  show({ resolved, step }: PullEvent): void {
    if (resolved !== null) {
      this.#layers = resolved.layers;
      process.stderr.write(`${resolved.name}: ${resolved.layers.length} layers, manifest ${resolved.manifest}\n`);
    }
    if (step === null) return;
    const { digest, size } = this.#layers[step.layer] ?? { digest: '', size: 0 };
    const title = `layer ${step.layer + 1}/${this.#layers.length} ${digest.slice(0, 19)}`;
    if (step.state !== 'fetching') process.stderr.write(`${title}: ${WORDS[step.state]}\n`);
    else if (step.bytes === 0) process.stderr.write(`${title}: fetching ${formatBytes(size)}\n`);
  }

  end(): void {}
}

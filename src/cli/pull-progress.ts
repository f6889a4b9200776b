// What a pull shows of itself while it goes on: one line per layer, for logs and pipes. For terminals see pull-bar.ts.
import { formatBytes } from '../units.ts';
import type { PullEvent } from './pull-client.ts';

export interface Progress {
  show(event: PullEvent): void;
  end(): void;
}

const WORDS = {
  present: 'already here',
  lazy: 'lazy, nothing fetched',
  stored: 'read and stored',
  unpacked: 'unpacked',
  unpacking: 'unpacking',
} as const;

export class LineProgress implements Progress {
  #layers: readonly { readonly digest: string; readonly size: number }[] = [];

  show(event: PullEvent): void {
    if (event.kind === 'resolved') {
      this.#layers = event.layers;
      process.stderr.write(`${event.name}: ${event.layers.length} layers, manifest ${event.manifest}\n`);
      return;
    }
    const { digest, size } = this.#layers[event.layer] ?? { digest: '', size: 0 };
    const title = `layer ${event.layer + 1}/${this.#layers.length} ${digest.slice(0, 19)}`;
    if (event.state !== 'fetching') process.stderr.write(`${title}: ${WORDS[event.state]}\n`);
    else if (event.bytes === 0) process.stderr.write(`${title}: fetching ${formatBytes(size)}\n`);
  }

  end(): void {}
}

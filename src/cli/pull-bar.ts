// One bar over all layers of a pull, for a terminal. Loaded only where there is one.
import cliProgress from 'cli-progress';
import { formatBytes } from '../units.ts';
import type { PullEvent } from './pull-client.ts';
import type { Progress } from './pull-progress.ts';

export class BarProgress implements Progress {
  #bar: cliProgress.SingleBar | undefined;
  #sizes: readonly number[] = [];
  #done = 0;

  show(event: PullEvent): void {
    if (event.kind === 'resolved') {
      this.#sizes = event.layers.map(({ size }) => size);
      const layers = this.#sizes.length;
      this.#bar = new cliProgress.SingleBar(
        { format: '[{bar}] {layer}/{layers} layers  {step}', stream: process.stderr, hideCursor: true },
        cliProgress.Presets.shades_classic,
      );
      this.#bar.start(Math.max(1, layers), 0, { layer: 0, layers, step: '' });
      return;
    }
    switch (event.state) {
      case 'present':
      case 'lazy':
      case 'stored':
      case 'unpacked':
        this.#done = event.layer + 1;
        this.#bar?.update(this.#done, { layer: this.#done, step: '' });
        return;
      case 'unpacking':
        this.#bar?.update(this.#done + 0.9, { step: 'unpacking' });
        return;
      case 'fetching': {
        const size = this.#sizes[event.layer] ?? 0;
        this.#bar?.update(this.#done + (0.9 * event.bytes) / Math.max(1, size), {
          step: `fetching ${formatBytes(event.bytes)} of ${formatBytes(size)}`,
        });
        return;
      }
    }
  }

  end(): void {
    this.#bar?.stop();
    this.#bar = undefined;
  }
}

// One bar over all layers of a pull, for a terminal. Loaded only where there is one.
import cliProgress from 'cli-progress';
import type { PullEvent } from '../snapshotter/dedupd-client.ts';
import { formatBytes } from '../units.ts';
import type { Progress } from './pull-progress.ts';

export class BarProgress implements Progress {
  #bar: cliProgress.SingleBar | undefined;
  #sizes: readonly number[] = [];
  #done = 0;

  show({ resolved, step }: PullEvent): void {
    if (resolved !== null) {
      this.#sizes = resolved.layers.map(({ size }) => size);
      const layers = this.#sizes.length;
      this.#bar = new cliProgress.SingleBar(
        { format: '[{bar}] {layer}/{layers} layers  {step}', stream: process.stderr, hideCursor: true },
        cliProgress.Presets.shades_classic,
      );
      this.#bar.start(Math.max(1, layers), 0, { layer: 0, layers, step: '' });
    }
    switch (step?.state) {
      case 'present':
      case 'lazy':
      case 'unpacked':
        this.#done = step.layer + 1;
        this.#bar?.update(this.#done, { layer: this.#done, step: '' });
        return;
      case 'unpacking':
        this.#bar?.update(this.#done + 0.9, { step: 'unpacking' });
        return;
      case 'fetching': {
        const size = this.#sizes[step.layer] ?? 0;
        this.#bar?.update(this.#done + (0.9 * step.bytes) / Math.max(1, size), {
          step: `fetching ${formatBytes(step.bytes)} of ${formatBytes(size)}`,
        });
        return;
      }
      case undefined:
        return;
    }
  }

  end(): void {
    this.#bar?.stop();
    this.#bar = undefined;
  }
}

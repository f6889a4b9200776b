// A bar over the bytes of one image that is being warmed, for a terminal. Loaded only where there is one.
import cliProgress from 'cli-progress';
import { formatBytes } from '../units.ts';
import type { WarmEvent } from './warm-client.ts';
import { stepWords, type WarmDisplay } from './warm-progress.ts';

export class BarDisplay implements WarmDisplay {
  #bar: cliProgress.SingleBar | undefined;

  show(event: WarmEvent): void {
    const { reference, bytesDone, bytesTotal } = event;
    const payload = {
      reference,
      amount: bytesTotal === 0 ? stepWords(event) : `${formatBytes(bytesDone)} of ${formatBytes(bytesTotal)}`,
    };
    if (this.#bar === undefined) {
      this.#bar = new cliProgress.SingleBar(
        { format: '{reference} [{bar}] {amount}', stream: process.stderr, hideCursor: true },
        cliProgress.Presets.shades_classic,
      );
      this.#bar.start(Math.max(1, bytesTotal), bytesDone, payload);
      return;
    }
    // The start of an image tells what it needs only as it is read.
    this.#bar.setTotal(Math.max(1, bytesTotal));
    this.#bar.update(bytesDone, payload);
  }

  end(): void {
    this.#bar?.stop();
    this.#bar = undefined;
  }
}

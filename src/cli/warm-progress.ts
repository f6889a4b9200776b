// What a warm-up shows of itself while it goes on: nothing while it is short, then lines. For terminals see warm-bar.ts.
import { formatBytes } from '../units.ts';
import type { WarmEvent } from './warm-client.ts';

/** Shows how far one image is. */
export interface WarmDisplay {
  show(event: WarmEvent): void;
  end(): void;
}

/** What is over within this time shows nothing, milliseconds. */
const QUIET_MS = 2_000;
/** Between two lines that say how far the same step is, milliseconds. */
const LINE_MS = 10_000;

/** Shows events on what `open` makes, once the image takes longer than a moment. */
export class PatientDisplay implements WarmDisplay {
  readonly #open: () => WarmDisplay;
  readonly #timer: NodeJS.Timeout;
  #latest: WarmEvent | undefined;
  #shown: WarmDisplay | undefined;

  constructor(open: () => WarmDisplay, quietMs = QUIET_MS) {
    this.#open = open;
    this.#timer = setTimeout(() => {
      this.#shown = this.#open();
      if (this.#latest !== undefined) this.#shown.show(this.#latest);
    }, quietMs);
  }

  show(event: WarmEvent): void {
    this.#latest = event;
    this.#shown?.show(event);
  }

  end(): void {
    clearTimeout(this.#timer);
    this.#shown?.end();
    this.#shown = undefined;
  }
}

/** What a step is called. */
export function stepWords({ step }: WarmEvent): string {
  switch (step) {
    case 'resolve':
      return 'asking the registry what it is';
    case 'index':
      return 'fetching the indexes of its layers';
    case 'build':
      return 'building its file system';
    case 'fetch':
      return 'fetching';
    default:
      return step;
  }
}

/** One line a step, and one every ten seconds of fetching. */
export class LineDisplay implements WarmDisplay {
  readonly #write: (line: string) => void;
  #step = '';
  #writtenMs = 0;

  constructor(write: (line: string) => void = (line) => void process.stderr.write(`${line}\n`)) {
    this.#write = write;
  }

  show(event: WarmEvent): void {
    const now = performance.now();
    if (event.done || (event.step === this.#step && now - this.#writtenMs < LINE_MS)) return;
    this.#step = event.step;
    this.#writtenMs = now;
    const { reference, bytesDone, bytesTotal } = event;
    const amount = bytesTotal === 0 ? '' : ` ${formatBytes(bytesDone)} of ${formatBytes(bytesTotal)}`;
    this.#write(`${reference}: ${stepWords(event)}${amount}`);
  }

  end(): void {}
}

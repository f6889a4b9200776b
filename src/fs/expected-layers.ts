// Layers that no snapshot names yet, kept for whoever is about to: the rest of a pull, a standalone mount, a snapshot whose
// layer was just converted. Owned by LayerIntake, which drops nothing itself.

/** How long a layer that was fetched ahead waits for its Prepare, milliseconds. */
export const EXPECTED_MS = 600_000;

/** How long a layer waits for somebody who is there already to name it, milliseconds. */
const MOMENT_MS = 10_000;

/** Why a layer that no snapshot names is kept. */
interface Expectation {
  /** When it ends at the latest, by performance.now(). */
  readonly untilMs: number;
  /** Layers of the image that is being pulled: once no snapshot names one of them, the pull has ended. Empty: no pull. */
  readonly image: readonly number[];
  /** True while the pull is one of our own and goes on. */
  readonly underWay: () => boolean;
  /** Once a snapshot names it, it has arrived. */
  readonly forSnapshot: boolean;
}

const NOBODY = (): boolean => false;

export class ExpectedLayers {
  readonly #expected = new Map<number, Expectation>();

  /** For a mount under way, which no snapshot names. */
  forMount(layerId: number): void {
    this.#keep(layerId, EXPECTED_MS, false);
  }

  /** For a pull or a snapshot that has waited for it, and will say so itself in a moment. */
  forAMoment(layerId: number): void {
    this.#keep(layerId, MOMENT_MS, true);
  }

  /** For a pull that has still to offer it; `image` grows by the layers of the same image. */
  forPull(layerId: number, image: readonly number[], underWay: () => boolean): void {
    const untilMs = performance.now() + EXPECTED_MS;
    this.#expected.set(layerId, { untilMs, image, underWay, forSnapshot: false });
  }

  #keep(layerId: number, ms: number, forSnapshot: boolean): void {
    this.#expected.set(layerId, { untilMs: performance.now() + ms, image: [], underWay: NOBODY, forSnapshot });
  }

  has(layerId: number): boolean {
    return this.#expected.has(layerId);
  }

  /** How long it is kept at most, milliseconds; undefined when that cannot be told, as for a pull that goes on. */
  endsInMs(layerId: number): number | undefined {
    const expectation = this.#expected.get(layerId);
    if (expectation === undefined || expectation.image.length > 0) return undefined;
    return Math.max(1, Math.ceil(expectation.untilMs - performance.now()));
  }

  /** Something else keeps it now. */
  arrived(layerId: number): void {
    this.#expected.delete(layerId);
  }

  /** Layers kept for a pull or a mount that goes on; `named` are those that snapshots name. Forgets the others. */
  still(named: ReadonlySet<number>): number[] {
    for (const [layerId, { untilMs, image, underWay, forSnapshot }] of this.#expected) {
      // No Prepare is under way now: somebody else's pull that goes on has left a snapshot of one of its layers.
      const goesOn = image.length === 0 || underWay() || image.some((id) => named.has(id));
      const arrived = forSnapshot && named.has(layerId);
      if (!goesOn || arrived || performance.now() >= untilMs) this.#expected.delete(layerId);
    }
    return [...this.#expected.keys()];
  }
}

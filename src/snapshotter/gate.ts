// A lock with two modes: many may share it, or one has it alone. Keeps Cleanup from releasing a merged image between
// the moment a Prepare got it mounted and the moment the metastore knows that somebody uses it. Those who share never
// wait for one who is still waiting to be alone: Prepare holds containerd's lock, Cleanup has time.

export class Gate {
  #sharing = 0;
  #alone = false;
  readonly #sharers: (() => void)[] = [];
  readonly #loners: (() => void)[] = [];

  /** Runs `work` beside others that share; waits only while somebody is alone inside. */
  async shared<T>(work: () => Promise<T>): Promise<T> {
    if (this.#alone) await new Promise<void>((enter) => this.#sharers.push(enter));
    else this.#sharing++;
    try {
      return await work();
    } finally {
      this.#sharing--;
      this.#admit();
    }
  }

  /** Runs `work` with nobody else inside; false, and nothing done, when that does not come about in `patienceMs`. */
  async exclusive(work: () => Promise<void>, patienceMs: number): Promise<boolean> {
    if (!(await this.#enterAlone(patienceMs))) return false;
    try {
      await work();
    } finally {
      this.#alone = false;
      this.#sharing += this.#sharers.length;
      for (const enter of this.#sharers.splice(0)) enter();
      this.#admit();
    }
    return true;
  }

  #enterAlone(patienceMs: number): Promise<boolean> {
    return new Promise((resolve) => {
      const enter = (): void => {
        clearTimeout(timer);
        resolve(true);
      };
      const timer = setTimeout(() => {
        this.#loners.splice(this.#loners.indexOf(enter), 1);
        resolve(false);
      }, patienceMs);
      this.#loners.push(enter);
      this.#admit();
    });
  }

  #admit(): void {
    if (this.#alone || this.#sharing > 0) return;
    const enter = this.#loners.shift();
    if (enter === undefined) return;
    this.#alone = true;
    enter();
  }
}

// Four images pulled, run and removed side by side, many rounds: nothing may stay, and memory may not grow.
import { readdirSync } from 'node:fs';
import { pssBytes } from '../../src/bench/process-use.ts';
import { LazyNode, NOTHING_LEFT, smallLayers } from '../support/lazy-node.ts';

const IMAGES = 4;
/** Rounds after which everything that is made once has been made. */
const WARM_ROUNDS = 5;

export interface RoundsResult {
  readonly rounds: number;
  /** What was left after a round, as it was found; empty when nothing was. */
  readonly left: string[];
  /** Proportional set size of both processes, bytes. */
  readonly pssWarm: number;
  readonly pssEnd: number;
  readonly descriptorsWarm: number;
  readonly descriptorsEnd: number;
}

export async function runRounds(rounds: number, say: (text: string) => void): Promise<RoundsResult> {
  const node = await LazyNode.start({ containerd: { lifetimeSeconds: 4 * 3600 } });
  try {
    const images = await Promise.all(
      Array.from(
        { length: IMAGES },
        async (_, i) => await node.publish(`rounds/${i}`, await smallLayers(`round ${i}`)),
      ),
    );
    const pids = [node.product.servicePid ?? 0, await node.product.daemonPid()];
    const use = () => ({
      pss: pids.reduce((sum, pid) => sum + pssBytes(pid), 0),
      descriptors: pids.reduce((sum, pid) => sum + readdirSync(`/proc/${pid}/fd`).length, 0),
    });
    const left: string[] = [];
    let warm = use();
    for (let round = 1; round <= rounds; round++) {
      await Promise.all(
        images.map(async ({ lazy }, i) => {
          await node.rpull(lazy);
          const { stdout } = await node.runScript(lazy, 'cat /mark; sha256sum /cold > /dev/null');
          if (stdout !== `round ${i}`) left.push(`round ${round}: image ${i} said ${stdout}`);
          await node.containerd.ctr(['image', 'rm', '--sync', lazy]);
        }),
      );
      await node.collect();
      const found = JSON.stringify(await node.leftovers());
      if (found !== JSON.stringify(NOTHING_LEFT)) left.push(`round ${round}: ${found}`);
      if (round === WARM_ROUNDS) warm = use();
      if (round % 10 === 0) say(`round ${round}: ${JSON.stringify(use())}`);
    }
    const end = use();
    return {
      rounds,
      left,
      pssWarm: warm.pss,
      pssEnd: end.pss,
      descriptorsWarm: warm.descriptors,
      descriptorsEnd: end.descriptors,
    };
  } finally {
    await node.stop();
  }
}

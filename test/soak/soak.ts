// What a node must stand for long: `make soak`.
//   node test/soak/soak.ts [--rounds N] [--kills N] [--space MINUTES] [--seed N]
// N rounds of four images side by side, then N kills of each: dedupd, the service, both; then a node with too little room, on
// which images are evicted, removed, collected and killed while others read.
import { parseArgs } from 'node:util';
import { KillCampaign } from '../support/kill-campaign.ts';
import { SpaceCampaign } from '../support/space-campaign.ts';
import { runRounds } from './rounds.ts';

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '50' },
    kills: { type: 'string', default: '300' },
    space: { type: 'string', default: '60' },
    seed: { type: 'string' },
  },
});
/** PSS of both processes may grow by this much, bytes. */
const MAX_GROWTH_BYTES = 40e6;

function count(option: 'rounds' | 'kills' | 'space'): number {
  const number = Number(values[option]);
  if (!Number.isInteger(number) || number < 0) throw new Error(`--${option} ${values[option]} is not a number`);
  return number;
}

const say = (text: string): void => console.log(text);
const seed = values.seed === undefined ? {} : { seed: Number(values.seed) };
let good = true;
if (count('rounds') > 0) {
  const result = await runRounds(count('rounds'), say);
  say(JSON.stringify(result));
  good &&= result.left.length === 0 && result.pssEnd - result.pssWarm <= MAX_GROWTH_BYTES;
  good &&= result.descriptorsEnd <= result.descriptorsWarm + 8;
}
if (count('kills') > 0) {
  const each = count('kills');
  const result = await KillCampaign.run({ kills: { dedupd: each, service: each, both: each }, ...seed, say });
  say(JSON.stringify(result));
  good &&= result.wrong.length === 0 && result.lost.length === 0;
}
if (count('space') > 0) {
  const result = await SpaceCampaign.run({ seconds: 60 * count('space'), ...seed, say });
  say(JSON.stringify(result));
  good &&= result.wrong.length === 0;
}
say(good ? 'nothing was wrong, lost or left' : 'SOMETHING WAS WRONG, LOST OR LEFT');
process.exitCode = good ? 0 : 1;

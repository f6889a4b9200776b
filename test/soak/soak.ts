// The kill campaign at length: `make soak`.
//   node test/soak/soak.ts [--kills N] [--seed N]     N of each: dedupd, service, both
import { parseArgs } from 'node:util';
import { KillCampaign } from '../support/kill-campaign.ts';

const { values } = parseArgs({ options: { kills: { type: 'string', default: '300' }, seed: { type: 'string' } } });
const each = Number(values.kills);
if (!Number.isInteger(each) || each < 1) throw new Error(`--kills ${values.kills} is not a number of kills`);
const result = await KillCampaign.run({
  kills: { dedupd: each, service: each, both: each },
  ...(values.seed === undefined ? {} : { seed: Number(values.seed) }),
  say: (text) => console.log(text),
});
const good = result.wrong.length === 0 && result.lost.length === 0;
console.log(`${good ? 'nothing' : 'SOMETHING'} was wrong or lost`);
process.exitCode = good ? 0 : 1;

// SIGKILL of dedupd, of the service and of both while a container reads cold files and a client commits: no wrong byte, no
// lost snapshot, and the container reads on. `make soak` does the same some hundred times.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { KillCampaign } from '../support/kill-campaign.ts';

describe('a node whose processes are killed', () => {
  test('20 kills with a read or a commit under way: every byte is right, every answered commit is there', async (t) => {
    const kills = { dedupd: 8, service: 6, both: 6 };
    const result = await KillCampaign.run({ kills, say: (text) => t.diagnostic(text) });
    assert.deepEqual(result.wrong, []);
    assert.deepEqual(result.lost, []);
    assert.deepEqual(result.kills, kills);
    assert.ok(result.commits > 0 && result.reads > 250);
  });
});

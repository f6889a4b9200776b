// Too little room on a whole node: evictions, removals, collections and kills beside containers that read; every byte right,
// no zero, nothing left. `make soak` does it for an hour.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { SpaceCampaign } from '../support/space-campaign.ts';

/** CI has five minutes for it; SPACE_SECONDS says otherwise. */
const SECONDS = Number(process.env.SPACE_SECONDS ?? (process.env.CI === 'true' ? 300 : 60));

describe('a node with too little room', () => {
  test('serves every byte, whatever is evicted, removed, collected and killed', { timeout: 1_800_000 }, async (t) => {
    const result = await SpaceCampaign.run({ seconds: SECONDS, say: (text) => t.diagnostic(text) });
    t.diagnostic(JSON.stringify(result));
    assert.deepEqual(result.wrong, []);
    assert.ok(result.starts > 0 && result.reads > SECONDS / 2);
    assert.ok(result.direct > 0 && result.half + result.hydrated > 0, 'images were met in more than one state');
  });
});

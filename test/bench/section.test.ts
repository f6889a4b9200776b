import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { withSection } from './section.ts';

const page = '# Page\n\nWords.\n\n## One\n\nold\n\n### Deep\n\nold too\n\n## Others\n\nlast\n';

describe('withSection', () => {
  it('replaces a section with all below it, and nothing else', () => {
    assert.equal(withSection(page, 'One', 'new\n\n'), '# Page\n\nWords.\n\n## One\n\nnew\n\n## Others\n\nlast\n');
    assert.equal(withSection(page, 'Others', 'new'), page.replace('last', 'new'));
  });

  it('adds a new one before the last, or at the end', () => {
    assert.equal(withSection(page, 'Two', 'new'), page.replace('## Others', '## Two\n\nnew\n\n## Others'));
    assert.equal(withSection('# Page\n', 'Two', 'new'), '# Page\n\n## Two\n\nnew\n');
  });

  it('changes nothing when it is done again', () => {
    const once = withSection(page, 'Two', 'new');
    assert.equal(withSection(once, 'Two', 'new'), once);
  });
});

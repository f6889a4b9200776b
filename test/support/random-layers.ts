// Random layers over a handful of names, so that entries meet, replace, hide and link each other often. Deterministic by
// seed. Used to compare the merge with containerd's own unpack.
import type { EntrySpec } from './layer-maker.ts';

/** mulberry32: whole numbers below the one given; a small generator with a seed, so that a failure can be repeated. */
export function seededRandom(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

const NAMES = ['a', 'b', 'c', 'd-', '!', '\xe9'];

/** `layers` layers of `entries` members each. */
export function randomLayers(seed: number, layers: number, entries: number): EntrySpec[][] {
  const random = seededRandom(seed);
  const name = (): string => NAMES[random(NAMES.length)]!;
  const path = (): string => Array.from({ length: 1 + random(3) }, name).join('/');
  return Array.from({ length: layers }, (_, layer) => {
    const specs: EntrySpec[] = [];
    const files: string[] = [];
    /** Paths of this layer that are no directories: containerd refuses an entry below one, except through a symlink. */
    const blocked = new Set<string>();
    for (let i = 0; i < entries; i++) {
      const at = path();
      const parts = at.split('/');
      if (parts.some((_, depth) => depth > 0 && blocked.has(parts.slice(0, depth).join('/')))) continue;
      // containerd sets the times of directories last, and refuses when one has been replaced meanwhile.
      const usedAsDirectory = specs.some(
        (spec) =>
          spec.name.startsWith(`${at}/`) || (spec.name === at && spec.mode! >= 0o700 && spec.content === undefined),
      );
      const parent = at.includes('/') ? `${at.slice(0, at.lastIndexOf('/'))}/` : '';
      const common = {
        uid: random(3),
        gid: random(100_000),
        mode: 0o400 + random(0o200),
        mtime: [random(2e9), random(1e9)],
      } as const;
      const before = specs.length;
      switch (usedAsDirectory ? random(2) * 5 : random(12)) {
        case 0:
        case 1:
        case 2:
          specs.push({ name: at, ...common, mode: 0o700 + random(0o100) });
          break;
        case 3:
          specs.push({ name: at, link: random(2) === 0 ? path() : `../${name()}` });
          break;
        case 4: {
          const hidden = `${parent}${name()}`;
          const used = specs.some((spec) => spec.name === hidden || spec.name.startsWith(`${hidden}/`));
          // After a member of the same name, containerd refuses the whiteout in any but the lowest layer.
          if (used && layer > 0) break;
          specs.push({ name: `${parent}.wh.${hidden.slice(parent.length)}`, content: '' });
          for (const path of [...files]) {
            if (path === hidden || path.startsWith(`${hidden}/`)) files.splice(files.indexOf(path), 1);
          }
          if (layer > 0) blocked.add(hidden);
          break;
        }
        case 5:
          if (parent !== '') specs.push({ name: `${parent}.wh..wh..opq`, content: '' });
          break;
        case 6:
          if (files.length > 0)
            specs.push({ ...common, name: at, type: 'hardLink', link: files[random(files.length)]! });
          break;
        case 7:
          specs.push({ ...common, name: at, type: 'charDevice', dev: [0, layer === 0 ? 1 : random(2)] });
          break;
        case 8:
          specs.push({ ...common, name: at, type: 'fifo' });
          break;
        default:
          specs.push({
            ...common,
            name: at,
            content: `${layer}.${i}`,
            ...(random(3) === 0 ? { xattrs: { [`user.${i}`]: 'v' } } : {}),
          });
      }
      const added = specs[before];
      if (added === undefined || added.name !== at) continue;
      for (const path of [...files]) {
        if (path === at || path.startsWith(`${at}/`)) files.splice(files.indexOf(path), 1);
      }
      const directory = added.link === undefined && added.content === undefined && added.type === undefined;
      if (directory) blocked.delete(at);
      else if (added.link === undefined || added.type === 'hardLink') blocked.add(at);
      else blocked.delete(at);
      if (added.content !== undefined || (added.type === 'hardLink' && added.link !== at)) files.push(at);
    }
    return specs;
  });
}

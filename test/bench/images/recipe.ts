// What an image is made of, as data: a base from Debian suites and layers of steps above it, the way a Dockerfile has
// them. Says nothing of where or how it is built; the cache keys are made here, from everything that changes the result.
import { createHash } from 'node:crypto';
import type { Ready } from '../../../src/bench/result.ts';

/** One instruction inside a layer. */
export type Step =
  /** Debian packages, without those they merely recommend. */
  | { readonly install: readonly string[] }
  /** A shell script run as root inside the image, without network. */
  | { readonly run: string }
  /** A file written as it is. `mode` is 0o644 by default. */
  | { readonly file: string; readonly content: string; readonly mode?: number };

export interface LayerRecipe {
  /** Suites of the mirror that packages may come from, e.g. bookworm, bookworm-security. */
  readonly suites: readonly string[];
  readonly steps: readonly Step[];
}

export type BaseRecipe =
  /** The smallest root file system of the suites, without documentation, manuals and translations ("slim"). */
  | { readonly kind: 'debian'; readonly suites: readonly string[] }
  /** A static busybox with links for its applets. */
  | { readonly kind: 'busybox' };

export interface ImageRecipe {
  readonly base: BaseRecipe;
  /** Bottom to top. */
  readonly layers: readonly LayerRecipe[];
  /** The `config` object of the image configuration (Entrypoint, Cmd, Env, …). */
  readonly config: Readonly<Record<string, unknown>>;
}

export type ImageVersion = '1' | '2';

export interface BenchImageSpec {
  /** Short and fit for a file name. */
  readonly name: string;
  readonly title: string;
  readonly versions: readonly ImageVersion[];
  /** What it is made of, for people. */
  readonly composition: string;
  /** What an operator who goes from version 1 to 2 gets. */
  readonly update: string;
  /** What is run: Entrypoint and Cmd of the configuration. */
  readonly command: readonly string[];
  readonly ready: Ready;
  readonly recipe: (version: ImageVersion) => ImageRecipe;
}

/** Bumped when the way layers are made changes, so that none made in the old way is used. */
const MAKER = 2;

function key(...parts: unknown[]): string {
  return createHash('sha256')
    .update(JSON.stringify([MAKER, ...parts]))
    .digest('hex')
    .slice(0, 16);
}

/** Cache keys of the base and of each layer, bottom to top: each holds everything below it. */
export function layerKeys(recipe: ImageRecipe): string[] {
  const keys = [key(recipe.base)];
  for (const layer of recipe.layers) keys.push(key(keys.at(-1), layer));
  return keys;
}

/** Cache key of the whole image. */
export function imageKey(recipe: ImageRecipe): string {
  return key(layerKeys(recipe), recipe.config);
}

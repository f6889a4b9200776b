// Keeps a run's figures in one JSON file that is complete after every start: a run that is killed keeps what it has, and
// goes on from there when asked to.
import { existsSync } from 'node:fs';
import { mkdir, readFile, rename, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { DedupError } from '../errors.ts';
import type { BenchImage, BenchResult, ColdStartResult, Floor, ResourceTrace } from './result.ts';

type Mutable<T> = { -readonly [K in keyof T]: T[K] };

export class ResultFile {
  readonly path: string;
  readonly #result: Mutable<BenchResult>;

  private constructor(path: string, result: BenchResult) {
    this.path = path;
    this.#result = { ...result };
  }

  /**
   * Starts a file with `fresh`. With `resume`, an existing one of the same seed and snapshotters is continued: what it
   * has is not measured again. Errors: FAILED_PRECONDITION when it cannot be continued.
   */
  static async open(path: string, fresh: BenchResult, options: { readonly resume: boolean }): Promise<ResultFile> {
    await mkdir(dirname(path), { recursive: true });
    if (!options.resume || !existsSync(path)) return new ResultFile(path, fresh);
    const found = JSON.parse(await readFile(path, 'utf8')) as BenchResult;
    const same =
      found.format === fresh.format &&
      found.seed === fresh.seed &&
      found.snapshotters.join() === fresh.snapshotters.join();
    if (!same) {
      throw new DedupError('FAILED_PRECONDITION', `${path} is of another run`, {
        hint: `give the same snapshotters and --seed ${found.seed}, or another --output`,
      });
    }
    const names = new Set(found.images.map(({ name }) => name));
    const links = new Set(found.links.map(({ name }) => name));
    return new ResultFile(path, {
      ...found,
      images: [...found.images, ...fresh.images.filter(({ name }) => !names.has(name))],
      links: [...found.links, ...fresh.links.filter(({ name }) => !links.has(name))],
    });
  }

  /** The seed of the run in a file that is to be continued; undefined when there is none. */
  static async seedOf(path: string): Promise<number | undefined> {
    return existsSync(path) ? (JSON.parse(await readFile(path, 'utf8')) as BenchResult).seed : undefined;
  }

  get result(): BenchResult {
    return this.#result;
  }

  has(start: Pick<ColdStartResult, 'snapshotter' | 'image' | 'link' | 'pair'>): boolean {
    return this.#result.starts.some(
      ({ snapshotter, image, link, pair }) =>
        snapshotter === start.snapshotter && image === start.image && link === start.link && pair === start.pair,
    );
  }

  async addStart(start: Omit<ColdStartResult, 'order'>): Promise<void> {
    this.#result.starts = [...this.#result.starts, { ...start, order: this.#result.starts.length }];
    await this.#write();
  }

  async addFloor(floor: Floor): Promise<void> {
    this.#result.floors = [...this.#result.floors, floor];
    await this.#write();
  }

  async addTrace(trace: ResourceTrace): Promise<void> {
    this.#result.resources = [...this.#result.resources, trace];
    await this.#write();
  }

  /** Replaces what is known of an image, e.g. once its unpacked size is. */
  async setImage(image: BenchImage): Promise<void> {
    this.#result.images = this.#result.images.map((known) => (known.name === image.name ? image : known));
    await this.#write();
  }

  async #write(): Promise<void> {
    await writeFile(`${this.path}.part`, `${JSON.stringify(this.#result)}\n`);
    await rename(`${this.path}.part`, this.path);
  }
}

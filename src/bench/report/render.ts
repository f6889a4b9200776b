// Draws a report anew from its figures, without measuring.
//   node src/bench/report/render.ts RESULT.json DIRECTORY
import { readFile } from 'node:fs/promises';
import { parseResult } from './parse.ts';
import { writeReport } from './write.ts';

/** Reads `file` and writes its report into `directory`; resolves to the path of the page. */
export async function renderFile(file: string, directory: string): Promise<string> {
  return await writeReport(parseResult(await readFile(file, 'utf8'), file), directory);
}

if (import.meta.main) {
  const [file, directory] = process.argv.slice(2);
  if (file === undefined || directory === undefined) {
    console.error('usage: node src/bench/report/render.ts RESULT.json DIRECTORY');
    process.exitCode = 2;
  } else {
    console.log(await renderFile(file, directory));
  }
}

// The one thing a verb must know to reach a running dedupd: where its socket is. Read without the configuration's schema,
// which takes longer to load than such a verb takes; whatever is unusual is left to the schema.
import { readFileSync } from 'node:fs';
import { DEFAULT_CONFIG_FILE, DEFAULT_RUN_DIR } from '../paths.ts';

/** Errors: those of loadConfig, which is asked when the file is not plainly right. */
export async function runDirectory(configFile: string | undefined): Promise<string> {
  const simple = plainRunDirectory(configFile);
  if (simple !== undefined) return simple;
  const { loadConfig } = await import('../config.ts');
  return loadConfig(configFile ?? DEFAULT_CONFIG_FILE, configFile !== undefined).run_dir;
}

function plainRunDirectory(configFile: string | undefined): string | undefined {
  try {
    const value: unknown = JSON.parse(readFileSync(configFile ?? DEFAULT_CONFIG_FILE, 'utf8'));
    if (value === null || typeof value !== 'object' || Array.isArray(value)) return undefined;
    const { run_dir = DEFAULT_RUN_DIR } = value as { run_dir?: unknown };
    return typeof run_dir === 'string' && run_dir.startsWith('/') ? run_dir : undefined;
  } catch (error) {
    const absent = (error as NodeJS.ErrnoException).code === 'ENOENT' && configFile === undefined;
    return absent ? DEFAULT_RUN_DIR : undefined;
  }
}

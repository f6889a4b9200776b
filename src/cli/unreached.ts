// Why no dedupd answers a verb that needs one: said by those that speak to it without the configuration's schema.
import { DedupError, errorCode } from '../errors.ts';
import { DEFAULT_CONFIG_FILE } from '../paths.ts';

/**
 * An error to throw in place of `error`: it says why that is as it should be, where the configuration knows. `instead`: what else
 * could be done with lazy loading off. Errors that came from dedupd itself are returned as they are.
 */
export async function explainUnreached(
  error: unknown,
  configFile: string | undefined,
  instead: string,
): Promise<unknown> {
  if (!(error instanceof DedupError) || error.details.reached !== false) return error;
  const { lazyDisabledReason, loadConfig } = await import('../config.ts');
  const reason = lazyDisabledReason(loadConfig(configFile ?? DEFAULT_CONFIG_FILE, configFile !== undefined));
  const hint = 'start the service (systemctl start dedup-snapshotter), or look into the log of dedupd';
  if (reason === undefined) return new DedupError(errorCode(error), error.message, { cause: error, hint });
  return new DedupError('FAILED_PRECONDITION', `no dedupd runs, for lazy loading is off: ${reason}`, {
    cause: error,
    hint: `change ${configFile ?? DEFAULT_CONFIG_FILE}${instead === '' ? '' : `, or ${instead}`}`,
  });
}

// The service of proto/service.proto in terms of the Snapshotter: how far conversions are, pause and resume. Served by
// grpc-server.ts on the socket of the snapshots service; keeps no state.
import type { ServerUnaryCall, sendUnaryData, UntypedServiceImplementation } from '@grpc/grpc-js';
import type { Logger } from 'pino';
import type { ConverterStatus } from './converter.ts';
import { serviceError } from './snapshots-service.ts';
import type { Snapshotter } from './snapshotter.ts';

/** proto/service.proto, ConversionStatus. */
export interface ConversionStatus {
  readonly paused: boolean;
  readonly waiting: string;
  readonly pending: number;
  readonly later: number;
  readonly done: number;
  readonly left: readonly { readonly snapshot: number; readonly name: string; readonly reason: string }[];
  readonly failed: readonly {
    readonly snapshot: number;
    readonly attempts: number;
    readonly reason: string;
    readonly given_up: boolean;
  }[];
  readonly current: {
    readonly snapshot: number;
    readonly name: string;
    readonly bytes: number;
    readonly entries: number;
    readonly total: number;
    readonly held: string;
  } | null;
  readonly directories: readonly { readonly snapshot: number; readonly name: string; readonly reason: string }[];
}

function currentMessage({ id, ...progress }: NonNullable<ConverterStatus['current']>): ConversionStatus['current'] {
  return { snapshot: id, ...progress };
}

async function statusMessage({ converter, leftovers }: Snapshotter): Promise<ConversionStatus> {
  const { left, failed, current, ...status } = await converter.status();
  const named = ({ id, name, reason }: { id: number; name: string; reason: string }) => ({
    snapshot: id,
    name,
    reason,
  });
  return {
    ...status,
    left: left.map(named),
    failed: failed.map(({ id, attempts, reason, givenUp }) => ({ snapshot: id, attempts, reason, given_up: givenUp })),
    current: current === undefined ? null : currentMessage(current),
    directories: (await leftovers.waiting()).map(named),
  };
}

/** The handlers of dedup.v1.Conversions. */
export function conversionsService(snapshotter: Snapshotter, log: Logger): UntypedServiceImplementation {
  const answering =
    (method: string, act: () => Promise<void>) =>
    (_call: ServerUnaryCall<object, ConversionStatus>, answer: sendUnaryData<ConversionStatus>): void => {
      act()
        .then(() => statusMessage(snapshotter))
        .then(
          (status) => answer(null, status),
          (error: unknown) => {
            log.error({ method, err: error }, 'conversions call failed');
            answer(serviceError(error));
          },
        );
    };
  return {
    Status: answering('Status', async () => {}),
    Pause: answering('Pause', () => snapshotter.converter.pause()),
    Resume: answering('Resume', () => snapshotter.converter.resume()),
  };
}

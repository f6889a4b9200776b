// The client side of proto/service.proto, for verbs of the command line. Retries nothing.
import { credentials, type ServiceClientConstructor, type ServiceError } from '@grpc/grpc-js';
import { DedupError, GrpcStatus } from '../errors.ts';
import { loadProto } from '../protocol.ts';
import type { ConversionStatus } from './conversions-service.ts';

/** Pause waits for the end of what is under way. */
const DEADLINE_MS = 30_000;

export class ServiceClient {
  readonly #client: InstanceType<ServiceClientConstructor>;
  readonly #address: string;

  /** `address`: the unix socket of the snapshots service. Connects at the first call. */
  constructor(address: string) {
    const packages = loadProto('service.proto') as unknown as {
      dedup: { v1: { Conversions: ServiceClientConstructor } };
    };
    this.#address = address;
    this.#client = new packages.dedup.v1.Conversions(`unix:${address}`, credentials.createInsecure());
  }

  /** Errors: UNAVAILABLE when the service does not run, UNIMPLEMENTED when an older one does, INTERNAL. */
  conversions(method: 'Status' | 'Pause' | 'Resume'): Promise<ConversionStatus> {
    const invoke = this.#client[method] as (
      request: object,
      options: { deadline: number },
      done: (error: ServiceError | null, value: ConversionStatus) => void,
    ) => void;
    return new Promise((resolve, reject) => {
      invoke.call(this.#client, {}, { deadline: Date.now() + DEADLINE_MS }, (error, value) => {
        if (error === null) resolve(value);
        else reject(this.#convert(error));
      });
    });
  }

  #convert(cause: ServiceError): DedupError {
    switch (cause.code) {
      case GrpcStatus.unavailable:
        return new DedupError('UNAVAILABLE', `the service does not answer on ${this.#address}`, {
          cause,
          hint: 'start it: systemctl start dedup-snapshotter',
        });
      case GrpcStatus.unimplemented:
        return new DedupError('UNIMPLEMENTED', `who answers on ${this.#address} knows nothing of conversions`, {
          cause,
          hint: 'restart the service with the version of this program',
        });
      case GrpcStatus.deadlineExceeded:
        return new DedupError('DEADLINE', `the service on ${this.#address} did not answer in time`, { cause });
      default:
        return new DedupError('INTERNAL', `asking the service on ${this.#address}: ${cause.details}`, { cause });
    }
  }

  /** Ends the connection. Idempotent. */
  close(): void {
    this.#client.close();
  }
}

// Connections to one server that are opened before anybody needs them: a handshake takes one round trip, with TLS two, and
// passes beside requests whose answers say what comes next. Used by http-transport.ts, one for each of its pools.
import type { Socket } from 'node:net';
import type { buildConnector } from 'undici';

/** What was not taken by then was not needed. */
const UNUSED_MS = 5_000;

type Options = buildConnector.Options;
type Callback = buildConnector.Callback;

export class SpareConnections {
  readonly #connector: buildConnector.connector;
  readonly #count: number;
  readonly #opening: Promise<Socket>[] = [];
  #closed: boolean = false;

  constructor(connector: buildConnector.connector, count: number) {
    this.#connector = connector;
    this.#count = count;
  }

  /** Opens as many as there may be, unless some wait already. */
  open(url: URL): void {
    if (this.#closed || this.#opening.length > 0) return;
    const { protocol, host } = url;
    const hostname = url.hostname.replace(/^\[(.*)\]$/, '$1');
    const port = url.port || (protocol === 'https:' ? '443' : '80');
    for (let i = 0; i < this.#count; i++) this.#add({ protocol, hostname, host, port });
  }

  #add(options: Options): void {
    const opening = new Promise<Socket>((resolve, reject) => {
      this.#connector(options, (error, socket) => {
        if (socket === null) reject(error);
        else resolve(socket);
      });
    });
    this.#opening.push(opening);
    const discard = (): void => {
      const at = this.#opening.indexOf(opening);
      if (at >= 0) this.#opening.splice(at, 1);
      else return;
      opening.then(
        (socket) => socket.destroy(),
        () => undefined, // whoever needs a connection tries again, and is told
      );
    };
    opening.catch(discard);
    setTimeout(discard, UNUSED_MS).unref();
  }

  /** undici's connector: a connection that waits, or that is on its way; else a new one. */
  readonly connect = (options: Options, done: Callback): void => {
    const opening = this.#opening.shift();
    if (opening === undefined) {
      this.#connector(options, done);
      return;
    }
    opening.then(
      (socket) => {
        if (socket.destroyed || this.#closed) this.#connector(options, done);
        else done(null, socket as Parameters<Callback>[1] & Socket);
      },
      () => this.#connector(options, done),
    );
  };

  /** Ends what nobody has taken. */
  close(): void {
    this.#closed = true;
    for (const opening of this.#opening.splice(0)) {
      opening.then(
        (socket) => socket.destroy(),
        () => undefined, // it was not needed
      );
    }
  }
}

// A private certificate authority and server certificates signed by it, made with the openssl command for tests.
import { execFile } from 'node:child_process';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);

export interface TestCertificates {
  /** The authority's certificate, PEM. */
  readonly caFile: string;
  readonly certFile: string;
  readonly keyFile: string;
}

/** Makes an authority and a certificate for `names` ("DNS:localhost", "IP:127.0.0.1") in `dir`. */
export async function makeCertificates(
  dir: string,
  names: readonly string[] = ['DNS:localhost', 'IP:127.0.0.1'],
): Promise<TestCertificates> {
  const file = (name: string) => join(dir, name);
  const openssl = async (...args: string[]) => {
    await run('openssl', args, { timeout: 20_000 });
  };
  await openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', file('ca.key'));
  const caExtensions = [
    '-addext',
    'basicConstraints=critical,CA:TRUE',
    '-addext',
    'keyUsage=critical,keyCertSign,cRLSign',
  ];
  const ca = ['req', '-x509', '-new', '-key', file('ca.key'), '-subj', '/CN=test authority', '-days', '2', '-out'];
  // The default configuration adds basicConstraints of its own; an empty one keeps the certificate free of duplicates.
  await writeFile(file('empty.cnf'), '[req]\ndistinguished_name=dn\n[dn]\n');
  await openssl(...ca, file('ca.pem'), '-config', file('empty.cnf'), ...caExtensions);
  await openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', file('server.key'));
  const request = ['req', '-new', '-key', file('server.key'), '-subj', '/CN=test server', '-config', file('empty.cnf')];
  await openssl(...request, '-out', file('server.csr'));
  await writeFile(file('server.ext'), `subjectAltName=${names.join(',')}\nbasicConstraints=CA:FALSE\n`);
  const signing = ['-CA', file('ca.pem'), '-CAkey', file('ca.key'), '-CAcreateserial', '-extfile', file('server.ext')];
  const sign = ['x509', '-req', '-in', file('server.csr'), '-days', '2', '-out', file('server.pem')];
  await openssl(...sign, ...signing);
  return { caFile: file('ca.pem'), certFile: file('server.pem'), keyFile: file('server.key') };
}

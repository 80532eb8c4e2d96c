/* The load generator of `make bench`: connections to 127.0.0.1, with one thread for each, that send requests.

   It is written in C because the clients share the machine with the server under load, and Python clients would use
   most of it. bench/generator.py compiles it, documents the options and parses the output. The program connects, prints
   a line, waits for a line on its standard input, runs the load, and prints JSON. All times are in seconds. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 256 * 1024, PATHS = 256, HOSTS = 256, RECEIVE_TIMEOUT = 600 };

static struct {
    const char *mode, *hosts[HOSTS], *ca, *paths[PATHS];
    int port, connect, connections, host_count, path_count, resume;
    long count;
    double seconds;
} options = {.mode = "requests", .ca = "", .connections = 1};

struct times {
    double *values;
    size_t count, capacity;
};

struct client {
    pthread_t thread;
    int number, descriptor;
    const char *host;
    SSL *tls;
    SSL_SESSION *session;
    char *buffer;
    long count, resumed;
    double bytes;
    struct times first_byte, last_byte;
    double end;
};

static SSL_CTX *context;
static pthread_barrier_t ready, go;
static double began;

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, " (%s)\n", strerror(errno));
    ERR_print_errors_fp(stderr);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void record_time(struct times *times, double value)
{
    if (times->count == times->capacity) {
        times->capacity = times->capacity ? 2 * times->capacity : 1024;
        times->values = realloc(times->values, times->capacity * sizeof *times->values);
        if (!times->values)
            die("out of memory");
    }
    times->values[times->count++] = value;
}

static void send_all(struct client *client, const char *data, int length)
{
    if (client->tls) {
        if (SSL_write(client->tls, data, length) != length)
            die("cannot send the request");
    } else if (send(client->descriptor, data, length, MSG_NOSIGNAL) != length)
        die("cannot send the request");
}

/* Return the number of received bytes. Without TLS, `discard` drops them in the kernel, which saves copying them. */
static int receive(struct client *client, char *buffer, int size, int discard)
{
    int received = client->tls ? SSL_read(client->tls, buffer, size)
                          : (int)recv(client->descriptor, buffer, size, discard ? MSG_TRUNC : 0);
    if (received <= 0)
        die("the server closed the connection of client %d", client->number);
    return received;
}

/* Read at least a response head; return its length, and in `received` the number of bytes read with what follows it. */
static int read_head(struct client *client, int *received)
{
    char *end = NULL;
    *received = 0;
    while (!end) {
        if (*received == BUFFER - 1)
            die("the response head is longer than %d bytes", BUFFER - 1);
        *received += receive(client, client->buffer + *received, BUFFER - 1 - *received, 0);
        client->buffer[*received] = 0;
        end = strstr(client->buffer, "\r\n\r\n");
    }
    if (strncmp(client->buffer, "HTTP/1.", 7) || strncmp(client->buffer + 8, " 200", 4))
        die("the server answered %.300s", client->buffer);
    return end + 4 - client->buffer;
}

static void open_connection(struct client *client)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(options.port)};
    struct timeval timeout = {.tv_sec = RECEIVE_TIMEOUT};
    int on = 1, received;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    client->descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client->descriptor < 0 || connect(client->descriptor, (struct sockaddr *)&address, sizeof address))
        die("cannot connect to port %d", options.port);
    setsockopt(client->descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(client->descriptor, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    if (options.connect) {
        const char *host = client->host;
        int length = sprintf(client->buffer, "CONNECT %s:443 HTTP/1.1\r\nHost: %s:443\r\n\r\n", host, host);
        send_all(client, client->buffer, length);
        if (read_head(client, &received) != received)
            die("there is data after the response to CONNECT");
    }
    if (!*options.ca)
        return;
    SSL *tls = SSL_new(context);
    if (!tls || !SSL_set_fd(tls, client->descriptor) || !SSL_set_tlsext_host_name(tls, client->host)
        || !SSL_set1_host(tls, client->host) || (client->session && !SSL_set_session(tls, client->session)))
        die("cannot set up TLS");
    if (SSL_connect(tls) != 1)
        die("the TLS handshake failed");
    client->tls = tls;
}

static void close_connection(struct client *client)
{
    if (client->tls) {
        client->resumed += SSL_session_reused(client->tls);
        if (options.resume) {
            SSL_SESSION_free(client->session);
            client->session = SSL_get1_session(client->tls);
        }
        SSL_shutdown(client->tls);
        SSL_free(client->tls);
        client->tls = NULL;
    }
    close(client->descriptor);
}

/* Send one request and read the whole response. Its times count from `since`. */
static void do_request(struct client *client, double since)
{
    int received, head;
    int length = sprintf(client->buffer, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n",
                         options.paths[client->count % options.path_count], client->host);
    send_all(client, client->buffer, length);
    head = read_head(client, &received);
    char *field = strcasestr(client->buffer, "\r\nContent-Length:");
    if (!field || field > client->buffer + head)
        die("the response has no Content-Length: %.300s", client->buffer);
    long size = atol(field + 17), missing = size - (received - head);
    if (size && received == head)
        missing -= receive(client, client->buffer, BUFFER, 0);
    record_time(&client->first_byte, now() - since);
    while (missing > 0)
        missing -= receive(client, client->buffer, missing < BUFFER ? missing : BUFFER, 1);
    if (missing)
        die("the server sent data after the end of the body");
    record_time(&client->last_byte, now() - since);
    client->bytes += size;
    client->count++;
}

/* Send requests on an open connection: `count` of them, or as many as `seconds` allow. */
static void request_loop(struct client *client)
{
    while (options.count ? client->count < options.count : now() - began < options.seconds)
        do_request(client, now());
}

/* Open a new connection for each request. */
static void reconnect_loop(struct client *client)
{
    while (now() - began < options.seconds) {
        double since = now();
        open_connection(client);
        do_request(client, since);
        close_connection(client);
    }
}

/* Connect to each host in turn, and close the connection after the handshake. */
static void handshake_loop(struct client *client)
{
    for (; client->count < options.host_count; client->count++) {
        double since = now();
        client->host = options.hosts[client->count];
        open_connection(client);
        record_time(&client->first_byte, now() - since);
        record_time(&client->last_byte, now() - since);
        close_connection(client);
    }
}

static void *work(void *argument)
{
    struct client *client = argument;
    int reconnects = !strcmp(options.mode, "reconnects"), handshakes = !strcmp(options.mode, "handshakes");
    if ((!reconnects && !handshakes) || options.resume)
        open_connection(client);
    if (reconnects && options.resume) { /* the server sends the first session with its first response */
        do_request(client, now());
        close_connection(client);
        client->count = client->resumed = client->first_byte.count = client->last_byte.count = 0;
        client->bytes = 0;
    }
    pthread_barrier_wait(&ready);
    pthread_barrier_wait(&go);
    (reconnects ? reconnect_loop : handshakes ? handshake_loop : request_loop)(client);
    client->end = now() - began;
    return NULL;
}

static double cpu(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static int compare(const void *one, const void *other)
{
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static void print_quantiles(const char *name, struct client *clients, size_t offset)
{
    static const double quantiles[] = {0.5, 0.99};
    struct times all = {0};
    for (int number = 0; number < options.connections; number++) {
        struct times *times = (struct times *)((char *)&clients[number] + offset);
        for (size_t index = 0; index < times->count; index++)
            record_time(&all, times->values[index]);
    }
    qsort(all.values, all.count, sizeof *all.values, compare);
    printf(", \"%s\": [%.9f, %.9f]", name, all.values[(size_t)(quantiles[0] * (all.count - 1))],
           all.values[(size_t)(quantiles[1] * (all.count - 1))]);
}

static void print_results(struct client *clients, double used)
{
    double end = 0, bytes = 0;
    long count = 0, resumed = 0;
    for (int number = 0; number < options.connections; number++) {
        end = clients[number].end > end ? clients[number].end : end;
        bytes += clients[number].bytes;
        count += clients[number].count;
        resumed += clients[number].resumed;
    }
    if (!count)
        die("no request was completed in time");
    printf("{\"wall\": %.9f, \"cpu\": %.6f, \"count\": %ld, \"resumed\": %ld, \"bytes\": %.0f", end, used, count,
           resumed, bytes);
    print_quantiles("first_byte", clients, offsetof(struct client, first_byte));
    print_quantiles("last_byte", clients, offsetof(struct client, last_byte));
    printf(", \"first_byte_times\": [");
    for (int number = 0; number < options.connections; number++) {
        struct times *times = &clients[number].first_byte;
        printf("%s%.9f", number ? ", " : "", times->count ? times->values[0] : 0);
    }
    printf("]}\n");
}

static void read_option(const char *option)
{
    const char *value = strchr(option, '=');
    if (!value)
        die("unknown option %s", option);
    size_t length = value++ - option;
#define IS(name) (length == sizeof name - 1 && !strncmp(option, name, length))
    if (IS("mode"))
        options.mode = value;
    else if (IS("host") && options.host_count < HOSTS)
        options.hosts[options.host_count++] = value;
    else if (IS("ca"))
        options.ca = value;
    else if (IS("port"))
        options.port = atoi(value);
    else if (IS("connect"))
        options.connect = atoi(value);
    else if (IS("connections"))
        options.connections = atoi(value);
    else if (IS("count"))
        options.count = atol(value);
    else if (IS("seconds"))
        options.seconds = atof(value);
    else if (IS("resume"))
        options.resume = atoi(value);
    else if (IS("path") && options.path_count < PATHS)
        options.paths[options.path_count++] = value;
    else
        die("unknown option %s", option);
}

static void make_context(void)
{
    context = SSL_CTX_new(TLS_client_method());
    if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION)
        || !SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256") /* the first choice of Go's clients */
        || !SSL_CTX_load_verify_locations(context, options.ca, NULL))
        die("cannot set up TLS");
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, BUFFER);
}

int main(int count, char **arguments)
{
    for (int index = 1; index < count; index++)
        read_option(arguments[index]);
    if (*options.ca)
        make_context();
    struct client *clients = calloc(options.connections, sizeof *clients);
    pthread_barrier_init(&ready, NULL, options.connections + 1);
    pthread_barrier_init(&go, NULL, options.connections + 1);
    for (int number = 0; number < options.connections; number++) {
        clients[number].number = number;
        clients[number].host = options.hosts[0];
        clients[number].buffer = malloc(BUFFER);
        if (!clients[number].buffer || pthread_create(&clients[number].thread, NULL, work, &clients[number]))
            die("cannot start a thread");
    }
    pthread_barrier_wait(&ready);
    puts("ready");
    fflush(stdout);
    if (getchar() == EOF)
        return 1;
    double used = cpu();
    began = now();
    pthread_barrier_wait(&go);
    for (int number = 0; number < options.connections; number++)
        pthread_join(clients[number].thread, NULL);
    print_results(clients, cpu() - used);
    return 0;
}

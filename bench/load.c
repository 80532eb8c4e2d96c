/* The load of `make bench`: connections to 127.0.0.1, a thread for each, that ask for what they are told to.

   Written in C because the server under load shares its machine with its clients: Python's would use most of it.
   bench/generator.py compiles it, says what the options mean and reads what it prints. It connects, prints a line, waits
   for one on its standard input, does its job, and prints what that came to as JSON. Times are in seconds. */

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

enum { BUFFER = 256 * 1024, PATHS = 256, HOSTS = 256, PATIENCE = 600 };

static struct {
    const char *mode, *hosts[HOSTS], *ca, *paths[PATHS];
    int port, connect, connections, host_count, path_count, resume;
    long count;
    double seconds;
} options = {.mode = "requests", .ca = "", .connections = 1};

struct times {
    double *values;
    size_t count, room;
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
    struct times first, whole;
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

static void note(struct times *times, double value)
{
    if (times->count == times->room) {
        times->room = times->room ? 2 * times->room : 1024;
        times->values = realloc(times->values, times->room * sizeof *times->values);
        if (!times->values)
            die("no memory");
    }
    times->values[times->count++] = value;
}

static void send_all(struct client *client, const char *data, int length)
{
    if (client->tls) {
        if (SSL_write(client->tls, data, length) != length)
            die("the server takes no request");
    } else if (send(client->descriptor, data, length, MSG_NOSIGNAL) != length)
        die("the server takes no request");
}

/* Return how many bytes came; a body without TLS may be dropped in the kernel, so that no copy of it is made. */
static int receive(struct client *client, char *into, int room, int drop)
{
    int got = client->tls ? SSL_read(client->tls, into, room)
                          : (int)recv(client->descriptor, into, room, drop ? MSG_TRUNC : 0);
    if (got <= 0)
        die("the server hung up on client %d", client->number);
    return got;
}

/* Read up to the end of a head; return its length, and in `received` how much there is with what came behind it. */
static int read_head(struct client *client, int *received)
{
    char *end = NULL;
    *received = 0;
    while (!end) {
        if (*received == BUFFER - 1)
            die("a head without an end");
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
    struct timeval patience = {.tv_sec = PATIENCE};
    int on = 1, received;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    client->descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (client->descriptor < 0 || connect(client->descriptor, (struct sockaddr *)&address, sizeof address))
        die("no connection to port %d", options.port);
    setsockopt(client->descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(client->descriptor, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (options.connect) {
        int length = sprintf(client->buffer, "CONNECT %s:443 HTTP/1.1\r\nHost: %s:443\r\n\r\n", client->host, client->host);
        send_all(client, client->buffer, length);
        if (read_head(client, &received) != received)
            die("there is more than an answer to CONNECT");
    }
    if (!*options.ca)
        return;
    SSL *tls = SSL_new(context);
    if (!tls || !SSL_set_fd(tls, client->descriptor) || !SSL_set_tlsext_host_name(tls, client->host)
        || !SSL_set1_host(tls, client->host) || (client->session && !SSL_set_session(tls, client->session)))
        die("no TLS");
    if (SSL_connect(tls) != 1)
        die("the handshake failed");
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

/* Ask once, and read the whole answer. */
static void ask(struct client *client, double since)
{
    int received, head;
    int length = sprintf(client->buffer, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n",
                         options.paths[client->count % options.path_count], client->host);
    send_all(client, client->buffer, length);
    head = read_head(client, &received);
    char *field = strcasestr(client->buffer, "\r\nContent-Length:");
    if (!field || field > client->buffer + head)
        die("an answer without a length: %.300s", client->buffer);
    long size = atol(field + 17), missing = size - (received - head);
    if (size && received == head)
        missing -= receive(client, client->buffer, BUFFER, 0);
    note(&client->first, now() - since);
    while (missing > 0)
        missing -= receive(client, client->buffer, missing < BUFFER ? missing : BUFFER, 1);
    if (missing)
        die("the server sent more than was asked for");
    note(&client->whole, now() - since);
    client->bytes += size;
    client->count++;
}

/* Requests on a connection that stays open: `count` of them, or as many as `seconds` allow. */
static void keep_asking(struct client *client)
{
    while (options.count ? client->count < options.count : now() - began < options.seconds)
        ask(client, now());
}

/* A new connection for each request. */
static void keep_coming(struct client *client)
{
    while (now() - began < options.seconds) {
        double since = now();
        open_connection(client);
        ask(client, since);
        close_connection(client);
    }
}

/* A connection to each host, of which nothing but the handshake is wanted. */
static void greet(struct client *client)
{
    for (; client->count < options.host_count; client->count++) {
        double since = now();
        client->host = options.hosts[client->count];
        open_connection(client);
        note(&client->first, now() - since);
        note(&client->whole, now() - since);
        close_connection(client);
    }
}

static void *work(void *argument)
{
    struct client *client = argument;
    int visits = !strcmp(options.mode, "visits"), greets = !strcmp(options.mode, "greetings");
    if (!visits && !greets || options.resume)
        open_connection(client);
    if (visits && options.resume) { /* a session to begin with comes with the first answer */
        ask(client, now());
        close_connection(client);
        client->count = client->resumed = client->first.count = client->whole.count = 0;
        client->bytes = 0;
    }
    pthread_barrier_wait(&ready);
    pthread_barrier_wait(&go);
    (visits ? keep_coming : greets ? greet : keep_asking)(client);
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
            note(&all, times->values[index]);
    }
    qsort(all.values, all.count, sizeof *all.values, compare);
    printf(", \"%s\": [%.9f, %.9f]", name, all.values[(size_t)(quantiles[0] * (all.count - 1))],
           all.values[(size_t)(quantiles[1] * (all.count - 1))]);
}

static void print_outcome(struct client *clients, double used)
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
        die("nothing was done in time");
    printf("{\"wall\": %.9f, \"cpu\": %.6f, \"count\": %ld, \"resumed\": %ld, \"bytes\": %.0f", end, used, count, resumed,
           bytes);
    print_quantiles("first", clients, offsetof(struct client, first));
    print_quantiles("whole", clients, offsetof(struct client, whole));
    printf(", \"firsts\": [");
    for (int number = 0; number < options.connections; number++)
        printf("%s%.9f", number ? ", " : "", clients[number].first.count ? clients[number].first.values[0] : 0);
    printf("]}\n");
}

static void read_option(const char *option)
{
    const char *value = strchr(option, '=');
    if (!value)
        die("%s is no option", option);
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
        die("%s is no option", option);
}

static void make_context(void)
{
    context = SSL_CTX_new(TLS_client_method());
    if (!context || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION)
        || !SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256") /* what Go's clients ask for first */
        || !SSL_CTX_load_verify_locations(context, options.ca, NULL))
        die("no TLS");
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
            die("no thread");
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
    print_outcome(clients, cpu() - used);
    return 0;
}
